"""Answers of the demo's model: recorded ones about its own documents, rough guesses about others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

__all__ = ["answer", "digest_of"]

#: Kinds of documents, with the words that tell them; the first that is found counts.
_KINDS: Final = {
    "credit_note": "credit note|credit memo|gutschrift",
    "reminder": "reminder|mahnung|overdue",
    "purchase_order": "purchase order|bestellung|bon de commande",
    "contract": "agreement|contract|vertrag",
    "invoice": "invoice|rechnung|facture",
    "support": "ticket|help|problem|refund|error|anfrage",
}
_CATEGORIES: Final = {
    "credit_note": ("receivable", "low"),
    "reminder": ("support", "normal"),
    "purchase_order": ("receivable", "normal"),
    "contract": ("legal", "normal"),
    "invoice": ("payable", "normal"),
    "support": ("support", "normal"),
}
#: Flags of records that are dealt with first.
_URGENT: Final = {
    "prompt_injection",
    "overdue",
    "late_delivery",
    "bank_details_changed",
    "auto_renewal",
    "unlimited_liability",
    "urgent",
}
_FLAG_RISKS: Final = {
    "prompt_injection": ("high", "the text gives orders to whoever processes it"),
    "bank_details_changed": ("high", "asks for payment to a new bank account; call the supplier back"),
    "unlimited_liability": ("high", "contains a liability without a limit"),
    "overdue": ("medium", "payment is overdue"),
    "late_delivery": ("medium", "a delivery is late and a penalty may be due"),
    "auto_renewal": ("medium", "renews by itself unless notice is given"),
    "urgent": ("medium", "a customer reports an outage"),
    "two_currencies": ("medium", "amounts in more than one currency"),
    "total_missing": ("medium", "states no total"),
    "ocr_noise": ("medium", "badly scanned, check the figures against the original"),
    "empty": ("low", "nothing to read"),
}


def digest_of(task: str, text: str) -> str:
    """Return the SHA-256 (hex) of a task and the text of its user message.

    Line ends, white space around a document and the layout of JSON do not count, what they say does.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\ufeff \t\n")
    if task != "extract":
        text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{task}\n{text}".encode("utf-8", "replace")).hexdigest()


def answer(task: str, text: str) -> dict[str, Any]:
    """Return the answer to a task. Raises ValueError for records in another form than the pipeline's."""
    if task == "extract":
        recorded = _recorded().get(digest_of(task, text)[:12])
        return _guess(text) if recorded is None else recorded
    message = json.loads(text)
    records = message.get("records") if isinstance(message, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) and one.get("name") for one in records):
        raise ValueError('the user message must be JSON of the form {"records": [{"name": ...}, ...]}')
    if task == "classify":
        return {"labels": [_label(record) for record in records]}
    return {"risks": [_risk(record, records) for record in records]}


@cache
def _recorded() -> Mapping[str, dict[str, Any]]:
    data = json.loads(Path(__file__).with_name("answers.json").read_text("utf-8"))
    return {
        digest: {name: value for name, value in record.items() if name != "document"}
        for digest, record in data.items()
    }


def _guess(text: str) -> dict[str, Any]:
    """Return the record of an unknown document: its kind, number and total, if they are plain."""
    if not text.strip():
        nothing = dict.fromkeys(("party", "reference", "date", "currency", "total"))
        return {"kind": "other", **nothing, "summary": "Empty document", "flags": ["empty"]}
    kind = next((kind for kind, words in _KINDS.items() if re.search(words, text, re.IGNORECASE)), "other")
    number = re.search(r"\b(?:no|number|nr)\b\.?:? *([\w/-]*\d[\w/-]*)", text, re.IGNORECASE)
    total = re.search(r"^.*\btotal\b.*?(\d[\d,]*\.\d\d)", text, re.IGNORECASE | re.MULTILINE)
    is_bill = kind in ("invoice", "credit_note", "purchase_order")
    return {
        "kind": kind,
        "party": None,
        "reference": None if number is None else number[1],
        "date": None,
        "currency": None,
        "total": float(total[1].replace(",", "")) if is_bill and total is not None else None,
        "summary": f"{kind.replace('_', ' ').capitalize()} {number[1] if number else ''}".strip(),
        "flags": ["total_missing"] if is_bill and total is None else [],
    }


def _label(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return who handles a record, and how soon."""
    category, priority = _CATEGORIES.get(str(record.get("kind")), ("ignore", "low"))
    if record.get("kind") == "reminder" and record.get("total") is not None:
        category = "payable"
    priority = "high" if _URGENT.intersection(record.get("flags") or ()) else priority
    return {"name": record["name"], "category": category, "priority": priority}


def _risk(record: Mapping[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how risky it is to act on a record, among all of them."""
    causes = [cause for flag, cause in _FLAG_RISKS.items() if flag in (record.get("flags") or ())]
    number = ("kind", "reference", "party")
    if record.get("kind") == "invoice" and record.get("reference"):
        same = [one["name"] for one in records if all(one.get(name) == record.get(name) for name in number)]
        if others := [name for name in same if name != record["name"]]:
            causes.append(("high", f"the same invoice number is on {', '.join(others)}"))
    level = max((level for level, _ in causes), key=("low", "medium", "high").index, default="low")
    return {"name": record["name"], "level": level, "reasons": [reason for _, reason in causes]}
