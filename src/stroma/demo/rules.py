"""Rules that answer for the demo's model: read a business document, then sort and weigh the records.

The rules use the text only, never a file name, so that another folder of plain documents and mails works too.
They know English, German and French wording and number formats. They never calculate: a document that states
no total has ``total: null``, and the pipeline has to deal with it.
"""

from __future__ import annotations

import datetime
import email
import re
from collections import Counter
from collections.abc import Mapping
from email.utils import parseaddr
from typing import Any, Final

__all__ = ["classify", "extract", "parse_amount", "risk", "unwrap"]

# Ties go to the earlier kind: a credit note always names an invoice, an invoice seldom a credit note.
_KIND_WORDS: Final = {
    "credit_note": r"credit (?:note|memo)|gutschrift",
    "reminder": r"(?:\w+ )?reminder|mahnung|overdue",
    "purchase_order": r"purchase order|bestellung|bon de commande|order total",
    "contract": r"(?:[\w-]{1,30} ){0,3}agreement|contract|\w*vertrag|effective date",
    "invoice": r"(?:\w+ )?invoice|rechnung\w*|facture|amount due|total due|net à payer",
    "support": r"support|ticket|help|problem|question|refund|error|offline|anfrage|frage|fehler|handbuch",
}
_BILLS: Final = ("invoice", "credit_note", "purchase_order")
_CATEGORIES: Final = {
    "credit_note": ("receivable", "low"),
    "reminder": ("support", "normal"),
    "purchase_order": ("receivable", "normal"),
    "contract": ("legal", "normal"),
    "invoice": ("payable", "normal"),
    "support": ("support", "normal"),
}
_INJECTION: Final = (
    r"\b(?:ignore|disregard|forget)\b[^.\n]{0,40}\b(?:previous|prior|above)\b[^.\n]{0,20}\binstructions?"
    r"|\byou are now (?:in|an?|the)\b[^.\n]{0,40}\b(?:mode|assistant|agent|model)\b"
)
# Flag: the kinds of document that it is looked for in, and the words that mean it.
_FLAG_WORDS: Final = {
    "overdue": ("invoice reminder", r"\d days overdue|outstanding balance|offener betrag|\bmahnung\b"),
    "late_delivery": ("reminder", r"delivery reminder|overdue deliver|received neither"),
    "bank_details_changed": ("invoice reminder", r"bank (?:details|account)[^.]{0,60}\b(?:has|have) changed"),
    "auto_renewal": ("contract", r"automatic(?:ally)? renew|verlängert sich|tacite reconduction"),
    "unlimited_liability": (
        "contract",
        r"(?:liability|indemnity)[^.]{0,60}(?:\.\d[^.]{0,60})? (?:is|are|be) unlimited",
    ),
    "urgent": ("support", r"\burgent|\basap\b|\bdringend|\boutage\b|\boffline\b"),
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
    "encoding": ("low", "some characters could not be decoded"),
    "empty": ("low", "nothing to read"),
}
_URGENT: Final = {"prompt_injection", *_FLAG_WORDS}


def unwrap(text: str) -> str:
    """Return the document in a user message, without a ``DOCUMENT: name`` line before it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\ufeff \t\n")
    return re.sub(r"\ADOCUMENT: [^\n]*(?:\n|\Z)", "", text).strip()


def extract(text: str) -> dict[str, Any]:
    """Read kind, party, reference, date (YYYY-MM-DD), currency (ISO 4217), total, summary and flags of a document."""
    headers, body = _split_mail(unwrap(text))
    misread = 0 if headers else len(_NOISY_NUMBER.findall(body))
    if misread >= 4 or not _has(r"\w", body):
        record = dict.fromkeys(("kind", "party", "reference", "date", "currency", "total"))
        summary, flag = ("Scan with misread figures", "ocr_noise") if misread else ("Empty document", "empty")
        return record | {"kind": "other", "summary": summary, "flags": [flag]}
    flags = {"encoding"} if "\ufffd" in text else set[str]()
    if _has(_INJECTION, body):
        flags.add("prompt_injection")
        # An injected note may state a total or a reference, which must not be read.
        body = "\n\n".join(part for part in re.split(r"\n\s*\n", body) if not _has(_INJECTION, part))
    body = _plain(body)
    text = f"{headers.get('subject', '')}\n{body}"
    kind = _kind(headers.get("subject", ""), body)
    total, currency = None, None
    if kind in (*_BILLS, "contract", "reminder"):  # amounts in other documents are not a bill
        currencies = Counter(mark for _, mark in _amounts(body) if mark)
        total, currency = _total(body) or (None, None)
        currency = currency or next(iter(dict(currencies.most_common(1))), None)
        flags |= {"total_missing"} if total is None and kind in _BILLS else set()
        flags |= {"two_currencies"} if len(currencies) > 1 else set()
    looked_for = {flag: words for flag, (kinds, words) in _FLAG_WORDS.items() if kind in kinds.split()}
    flags |= {flag for flag, words in looked_for.items() if _has(words, text)}
    party = _party(kind, body, headers)
    reference = next((ref for ref in _REFERENCE.findall(text) if not _dates(ref)), None)
    day = _document_date(kind, body, _dates(headers.get("date", "")))
    summary = f"{kind.replace('_', ' ').capitalize()} {reference or ''} of {day}, {party or 'unknown party'}"
    return {
        "kind": kind,
        "party": party,
        "reference": reference,
        "date": day,
        "currency": currency,
        "total": total,
        "summary": summary[:160],
        "flags": sorted(flags),
    }


def classify(message: Mapping[str, Any]) -> dict[str, Any]:
    """Sort each record by who handles it, and how soon: ``{"labels": [{"name", "category", "priority"}]}``."""
    labels = []
    for record in _records(message):
        category, priority = _CATEGORIES.get(str(record.get("kind")), ("ignore", "low"))
        if record.get("kind") == "reminder" and record.get("total") is not None:
            category = "payable"
        priority = "high" if _URGENT.intersection(record.get("flags") or ()) else priority
        labels.append({"name": record["name"], "category": category, "priority": priority})
    return {"labels": labels}


def risk(message: Mapping[str, Any]) -> dict[str, Any]:
    """Weigh all records together: ``{"risks": [{"name", "level", "reasons"}]}``."""
    numbers: dict[str, list[str]] = {}
    for record in _records(message):
        if record.get("kind") == "invoice" and record.get("reference"):
            numbers.setdefault(f"{record['reference']} {record.get('party')}", []).append(record["name"])
    risks = []
    for record in _records(message):
        causes = [cause for flag, cause in _FLAG_RISKS.items() if flag in (record.get("flags") or ())]
        same = numbers.get(f"{record.get('reference')} {record.get('party')}", [])
        if record["name"] in same and len(same) > 1:
            others = ", ".join(name for name in same if name != record["name"])
            causes.append(("high", f"the same invoice number is on {others}"))
        level = max((level for level, _ in causes), key=("low", "medium", "high").index, default="low")
        risks.append({"name": record["name"], "level": level, "reasons": [reason for _, reason in causes]})
    return {"risks": risks}


def _records(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    records = message.get("records")
    if not isinstance(records, list) or not all(isinstance(one, dict) and one.get("name") for one in records):
        raise ValueError('the user message must be JSON of the form {"records": [{"name": ...}, ...]}')
    return records


def _has(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def _split_mail(text: str) -> tuple[dict[str, str], str]:
    """Return the headers of a mail, names in lower case, and its body; no headers if the text is not a mail."""
    head, _, body = text.partition("\n\n")
    if len(set(re.findall(r"^(from|to|subject|date):", head.lower(), re.MULTILINE))) < 3:
        return {}, text
    return {name.lower(): str(value) for name, value in email.message_from_string(head).items()}, body


# A number in which a scanner read digits as letters ("l,O84.5O"); "10l" is ten litres.
_NOISY_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?!\d+l\b)(?=\S*\d)[\d.,/:-]*[OolI|][\dOolI|.,/:-]*(?![A-Za-z0-9])"
)


def _plain(text: str) -> str:
    """Return the text without Markdown and quotations, with two spaces between the columns of a CSV line."""
    text = re.sub(r"\*\*|^#{1,6} +|^>.*\n?", "", text.translate({0xA0: " ", 0x202F: " "}), flags=re.MULTILINE)
    return re.sub(r" *(?:[;|\t] *)+", "  ", text)


def _kind(subject: str, body: str) -> str:
    cells = [subject] if subject else [cell for line in body.split("\n")[:24] for cell in line.split("  ")]
    scores = Counter[str]()
    for kind, words in _KIND_WORDS.items():
        headings = sum(_has(rf"\A[\W_]*(?:(?:aw|re): )?(?:{words})\b", cell) for cell in cells)
        mentions = len(re.findall(rf"\b(?:{words})\b", body, re.IGNORECASE))
        scores[kind] = 6 * min(headings, 2) + min(mentions, 4) + 4 * _has(rf"\b(?:{words})\b", subject)
    kind, score = scores.most_common(1)[0]
    return kind if score >= 2 else "other"


# ---------------------------------------------------------------------- amounts and dates

_SYMBOLS: Final = {"€": "EUR", "$": "USD", "£": "GBP"}
_CURRENCY = r"(?:[€$£]|\b(?:EUR|USD|GBP|CHF|SEK|NOK|DKK|PLN)\b)"
_AMOUNT = re.compile(
    rf"(?<![\w.,/])(?P<sign>-)?(?:(?P<before>{_CURRENCY}) *)?"
    r"(?P<number>\d{1,3}(?:[.,'’ ]\d{3})+(?:[.,]\d{1,2})?|\d+(?:[.,]\d{1,2})?)"
    rf"(?![\w/]|[.,]?\d| ?%|-\d)(?: ?(?P<after>{_CURRENCY}))?"
)
_TOTAL_LABELS: Final = (
    r"(?:total|balance|amount)\s+due|outstanding\s+balance|(?:order|contract)\s+(?:total|value)|total\s+credit"
    r"|gesamtbetrag|offener\s+betrag|total\s+ttc|net\s+à\s+payer",
    r"(?<!sub)(?<!sub-)total(?!\s*(?:ht|net|hours|items)\b)|summe",
)


def parse_amount(number: str) -> float:
    """Parse ``1.234,56``, ``1,234.56``, ``1 234,56`` or ``1234``; a separator before three digits groups them."""
    number = re.sub(r"[.,](?=\d{1,2}\Z)", "#", number)
    return float(re.sub(r"[^\d#]", "", number).replace("#", "."))


def _amounts(text: str) -> list[tuple[float, str | None]]:
    """Return value and currency of each amount; a number without currency and decimals is a count."""
    return [
        (parse_amount(match["number"]) * (-1 if match["sign"] else 1), _SYMBOLS.get(mark, mark))
        for match in _AMOUNT.finditer(text)
        if (mark := match["before"] or match["after"]) or re.search(r"[.,]\d\d\Z", match["number"])
    ]


def _total(text: str) -> tuple[float, str | None] | None:
    for label in _TOTAL_LABELS:
        for match in re.finditer(rf"\b(?:{label})\b", text, re.IGNORECASE):
            # The amount stands on the line of its label or on the next one.
            for amounts in filter(None, map(_amounts, text[match.end() :].split("\n")[:2])):
                return next((amount for amount in amounts if amount[1]), amounts[-1])
    return None


_MONTHS: Final = ("ja", "f", "m[aä]r", "a[pv]", "ma[iy]", "jui?n", "jui?l", "a[uo]", "s", "o", "n", "d")
_DATE = re.compile(
    r"(?<![\w.,/-])(?:(?P<y0>\d{4})-(?P<m0>\d\d)-(?P<d0>\d\d)|(?P<d1>\d{1,2})\.? (?P<m1>[^\W\d]{3,9}) (?P<y1>\d{4})"
    r"|(?P<m2>[A-Z][a-z]{2,8}) (?P<d2>\d{1,2}),? (?P<y2>\d{4})|(?P<d3>\d{1,2})(?P<sep>[./])(?P<m3>\d{1,2})[./]"
    r"(?P<y3>\d{4}))(?![\w/-])"
)


def _dates(text: str) -> list[str]:
    """Return each date of the text as YYYY-MM-DD; of 04/05/2025 the second number is the month."""
    dates = []
    for match in _DATE.finditer(text):
        year, month, day = next(part for n in "0123" if (part := match.group(f"y{n}", f"m{n}", f"d{n}"))[0])
        if month.isdigit() and int(month) > 12:
            month, day = day, month
        names = (n for n, name in enumerate(_MONTHS, start=1) if re.match(name, month, re.IGNORECASE))
        try:
            number = int(month) if month.isdigit() else next(names, 0)
            dates.append(datetime.date(int(year), number, int(day)).isoformat())
        except ValueError:  # 31/02 only looks like a date
            continue
    return dates


def _document_date(kind: str, text: str, sent: list[str]) -> str | None:
    """Return the date that a mail was sent; of a bill the labelled date, else the first one."""
    if sent and kind not in _BILLS:
        return sent[0]  # the dates inside such a mail are those of other documents
    label = r"(?:(?:invoice|order|effective) |(?<!due )(?<!delivery )\b)date *:? *|rechnungsdatum:? *"
    labelled = [date for after in re.split(label, text, flags=re.I)[1:] for date in _dates(after[:16])]
    return next(iter(labelled + _dates(text) + sent), None)


# ---------------------------------------------------------------------- party and reference

_SUFFIXES: Final = ("GmbH", "AG", "KG", "Ltd", "LLC", "Inc.", "SARL", "SAS", "S.p.A.", "B.V.", "ApS", "AS")
_SUFFIX = "|".join(re.escape(form) for suffix in _SUFFIXES for form in (suffix, suffix.upper()))
_NAME_WORD = r"(?:(?!\d+\. )[A-Z0-9À-ÖØ-Þ\ufffd][\w'’&\ufffd-]*|&|and|und|et|of|de|von)"
_COMPANY = re.compile(rf"(?<![\w@.])(?:{_NAME_WORD} ){{1,6}}?(?:{_SUFFIX})(?![\w@])")
_REFERENCE = re.compile(
    r"\b(?:invoice|rechnungs?|facture|credit memo|purchase order|po|order|agreement|contract|reference|ticket)"
    r" *(?:(?:number|nummer|no|nr|n°|#)\.?)? *[:.#]* *((?=[\w./-]*\d)\w(?:[\w/-]*\w)?)",
    re.IGNORECASE,
)


def _company(text: str) -> str | None:
    match = _COMPANY.search(text)
    # "BRANDT FEINMECHANIK GMBH" becomes "Brandt Feinmechanik GmbH", so that records of one party are equal.
    suffixes = {suffix.upper(): suffix for suffix in _SUFFIXES}
    words = match.group().split() if match else []
    shouted = all(word.isupper() or word == "&" for word in words)
    return " ".join(suffixes.get(word, word.capitalize()) if shouted else word for word in words) or None


def _party(kind: str, text: str, headers: Mapping[str, str]) -> str | None:
    """Return the sender of a mail, the buyer of an order, the first company of a contract, else the letterhead."""
    if "from" in headers:
        name, address = parseaddr(headers["from"])
        # "Tidewater Hosting Billing" signs as "Tidewater Hosting Ltd".
        companies = (match.group() for match in _COMPANY.finditer(text))
        return _company(name) or next(
            (c for c in companies if c.split()[:2] == name.split()[:2]), name or address
        )
    buyer = re.search(r"^\s*buyer\b.*", text, re.IGNORECASE | re.MULTILINE)
    line = buyer.group() if buyer else text.strip().split("\n")[0]
    is_name = kind != "other" and re.fullmatch(r"(?:[A-ZÀ-Þ][^\W\d]+ ?){2,4}", line)
    return _company(text if kind == "contract" else line) or (line if is_name else None)
