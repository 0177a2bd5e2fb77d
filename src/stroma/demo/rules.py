"""What the demo's model "knows": rules that read a business document and sort and weigh what was read.

The rules go by the text alone, never by a file's name or a list of the documents that ship with the demo, so
that a folder nobody has seen works too. They read English, German and French wording and the number and date
formats that go with them. Like a model they are sometimes unsure, and say so in `flags`; unlike one they
never do sums: a document without a stated total has `total: null`, which is for the pipeline to deal with.
"""

from __future__ import annotations

import email
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr, parsedate_to_datetime
from typing import Any, Final

LEVELS: Final = ("low", "medium", "high")

# --- Preparing the text -------------------------------------------------------------------------------------


def unwrap(text: str) -> str:
    """The document in a user message, less a `DOCUMENT: name` line before or `<document>` tags around it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\ufeff \t\n")
    text = re.sub(r"\A(?:DOCUMENT|FILE|NAME): [^\n]*(?:\n|\Z)", "", text)
    text = re.sub(r"\A\s*<document\b[^>\n]*>|</document>\s*\Z", "", text)
    return text.strip()


@dataclass(frozen=True, slots=True)
class _Mail:
    headers: Mapping[str, str]
    body: str


def _split_mail(text: str) -> _Mail | None:
    """Headers (names in lower case) and plain body, or None if the text does not start like a mail."""
    head, _, rest = text.partition("\n\n")
    names = {name.lower() for name in re.findall(r"^([A-Za-z][A-Za-z-]*):", head, re.MULTILINE)}
    if not re.match(r"[A-Za-z][A-Za-z-]*: ?\S", head) or len(names & {"from", "to", "subject", "date"}) < 3:
        return None
    message = email.message_from_string(text)
    headers: dict[str, str] = {}
    for name, value in message.items():
        try:
            value = str(make_header(decode_header(value)))
        except (LookupError, ValueError, MessageError):
            pass  # an unknown or a lying charset: the raw header still says something
        headers.setdefault(name.lower(), re.sub(r"\s+", " ", value))
    encoded = str(message.get("Content-Transfer-Encoding", "")).lower() in {"base64", "quoted-printable"}
    # An unencoded body is taken as it stands: it is text already, whatever charset the file declares.
    return _Mail(headers, _decoded_body(message) if message.is_multipart() or encoded else rest)


def _decoded_body(message: Message) -> str:
    for wanted in ("text/plain", "text/html"):
        for part in message.walk():
            if part.get_content_type() != wanted:
                continue
            payload = part.get_payload(decode=True)
            if not isinstance(payload, bytes):
                continue
            try:
                body = payload.decode(part.get_content_charset() or "utf-8", "replace")
            except LookupError:
                body = payload.decode("utf-8", "replace")
            return body if wanted == "text/plain" else re.sub(r"<[^>]*>", " ", body)
    return ""


# A number in which a scanner read some digits as letters: "l,O84.5O", "l2/O5/2O25".
_NOISY_NUMBER = re.compile(r"(?<![A-Za-z0-9])[\dOolI|]+(?:[.,/:-][\dOolI|]+)*(?![A-Za-z0-9])")
# A word in which it read letters as digits or as other letters: "T0TAL", "lnvoice", "FENWlCK", "circuIator".
_NOISY_WORD = re.compile(
    r"\b(?:[A-Za-z]+0[A-Za-z]+|0[a-z]{2,}|l[nN][A-Za-z]{4,}|[A-Z]{2,}l[A-Z]*|[A-Za-z]*[a-z]I[a-z]*"
    r"|[A-Z]I[a-z]{3,})\b"
)
_SPACED_WORD = re.compile(r"\b(?:[A-Za-z] ){4,}[A-Za-z]\b")


def _is_noisy_number(token: str) -> bool:
    return any(c.isdigit() for c in token) and any(c in "OolI|" for c in token)


def _has_ocr_noise(text: str) -> bool:
    # "10l" is ten litres unless there is other evidence.
    tokens = (m.group() for m in _NOISY_NUMBER.finditer(text))
    numbers = sum(_is_noisy_number(t) and not re.fullmatch(r"\d+l", t) for t in tokens)
    words = sum(1 for _ in _NOISY_WORD.finditer(text))
    # Both are needed: "userId" is an ordinary word, but not in a text with several misread numbers.
    return numbers >= 2 and numbers + words >= 4


def _repair_ocr(text: str) -> str:
    def number(match: re.Match[str]) -> str:
        token = match.group()
        return token.translate(_DIGITS) if _is_noisy_number(token) else token

    def word(match: re.Match[str]) -> str:
        token = match.group()
        if sum(c.isupper() for c in token) >= sum(c.islower() and c != "l" for c in token):
            return token.replace("0", "O").replace("l", "I")
        token = re.sub(r"\A0", "O", token).replace("0", "o")
        token = re.sub(r"\Al(?=[nN])", "I", token)
        return token[0] + token[1:].replace("I", "l")

    text = _SPACED_WORD.sub(lambda m: m.group().replace(" ", ""), text)
    text = _NOISY_NUMBER.sub(number, text)
    text = _NOISY_WORD.sub(word, text)
    return re.sub(r"\b(A|a|Pay|pay)rn(ount|ent)\b", r"\1m\2", text)


_DIGITS = str.maketrans({"O": "0", "o": "0", "l": "1", "I": "1", "|": "1"})

_INJECTION = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:previous|prior|above|earlier|preceding|system)\b"
    r"[^.\n]{0,20}\b(?:instructions?|prompts?|rules|messages?)\b"
    r"|\b(?:ignoriere|vergiss|missachte)\w*\b[^.\n]{0,40}\b(?:anweisung|vorgabe|regel)\w*"
    r"|\bignore[rz]\b[^.\n]{0,40}\binstructions\b"
    r"|\byou are now (?:in|an?|the)\b[^.\n]{0,40}\b(?:mode|assistant|agent|model)\b"
    r"|\b(?:note|message|instructions?) (?:to|for) the (?:automated |ai )?(?:assistant|model|agent|ai)\b"
    r"|\bsystem prompt\b",
    re.IGNORECASE,
)


def _without_injection(text: str) -> str:
    """The text less paragraphs that give orders to their reader; less those lines if nothing else is left."""
    kept = [p for p in re.split(r"\n\s*\n", text) if not _INJECTION.search(p)]
    if kept:
        return "\n\n".join(kept)
    return "\n".join(line for line in text.split("\n") if not _INJECTION.search(line))


def _plain(text: str) -> str:
    """The text without Markdown marks, the columns of tables and CSV lines set apart by two spaces."""
    text = text.translate({0xA0: " ", 0x2009: " ", 0x202F: " ", 0x2212: "-"})
    text = re.sub(r"\*\*|__|^#{1,6} +", "", text, flags=re.MULTILINE)
    lines = []
    for line in text.split("\n"):
        for separator in (";", "|", "\t"):
            if line.count(separator) >= (1 if separator == "\t" else 2):
                line = re.sub(rf"[ ]*(?:{re.escape(separator)}[ ]*)+", "  ", line).strip()
        lines.append(line)
    return "\n".join(lines)


# --- Amounts ------------------------------------------------------------------------------------------------

_SYMBOLS: Final = {"€": "EUR", "$": "USD", "US$": "USD", "£": "GBP", "¥": "JPY"}
_CURRENCY = r"(?:US\$|[€$£¥]|\b(?:EUR|USD|GBP|CHF|SEK|NOK|DKK|PLN|CZK|JPY|CAD|AUD)\b)"
_NUMBER = r"(?:\d{1,3}(?:[.,'’ ]\d{3})+(?:[.,]\d{1,2})?|\d+(?:[.,]\d{1,2})?)"
_AMOUNT = re.compile(
    rf"(?<![\w.,/])(?P<sign>[-(] ?)?(?:(?P<before>{_CURRENCY})[ ]{{0,20}})?(?P<sign2>-)?"
    rf"(?P<number>{_NUMBER})(?![\w/]|[.,]?\d| ?%|-\d)(?:[ ]{{0,2}}(?P<after>{_CURRENCY}))?"
)


@dataclass(frozen=True, slots=True)
class _Amount:
    value: float
    currency: str | None
    exact: bool  # it has a currency or decimals, so it is money and not a count


def parse_amount(number: str) -> float:
    """`1.234,56`, `1,234.56`, `1 234,56`, `1'234.50` or `1234`; one separator before three digits groups."""
    number = re.sub(r"[ '’]", "", number)
    decimals = re.search(r"[.,](\d{1,2})\Z", number)
    if decimals is None:
        return float(re.sub(r"[.,]", "", number))
    return float(re.sub(r"[.,]", "", number[: decimals.start()]) + "." + decimals.group(1))


def _amounts(text: str) -> list[_Amount]:
    found = []
    for match in _AMOUNT.finditer(text):
        mark = match["before"] or match["after"]
        value = parse_amount(match["number"])
        negative = bool(match["sign2"]) or (match["sign"] or "").startswith(("-", "("))
        # A parenthesis that does not close right after the number opens a remark, it does not negate.
        if (match["sign"] or "").startswith("(") and text[match.end() : match.end() + 1] != ")":
            negative = False
        exact = mark is not None or re.search(r"[.,]\d{2}\Z", match["number"]) is not None
        found.append(
            _Amount(-value if negative else value, _SYMBOLS.get(mark, mark) if mark else None, exact)
        )
    return found


# From the most to the least telling. A label that a longer word or phrase turns into something else is left
# out by `_NOT_A_TOTAL`.
_TOTAL_LABELS = (
    r"(?:total|balance|amount)\s+(?:now\s+)?due|outstanding\s+(?:balance|amount)|(?:amount|total)\s+payable"
    r"|(?:grand|invoice|order|credit)\s+total|total\s+(?:invoice\s+)?amount|total\s+credit"
    r"|(?:total\s+)?contract\s+value|gesamtbetrag|rechnungsbetrag|endbetrag|bruttobetrag|zahlbetrag|gesamtsumme|gesamtwert|offener\s+betrag|zu\s+zahlen(?:der\s+betrag)?|total\s+ttc|net\s+[aà]\s+payer"
    r"|montant\s+total|totale\s+(?:fattura|documento)|importe\s+total",
    r"total|summe|gesamt|totale",
)
_NOT_A_TOTAL = re.compile(
    r"(?:sub|zwischen|line|previous|carried)[ -]*\Z|\b(?:teil|zwischen)\w*\Z", re.IGNORECASE
)
_TOTAL_OF_ELSE = re.compile(
    r"\s*(?:ht\b|net\b|netto|excl|before|ex\.? |hours|items?\b|weight|quantity|qty|units|vat\b|tax\b|mwst"
    r"|tva\b|discount|pages|number of|carried|zzgl)",
    re.IGNORECASE,
)


def _totals(text: str, *, tier: int) -> list[_Amount]:
    found: list[_Amount] = []
    for match in re.finditer(rf"\b(?:{_TOTAL_LABELS[tier]})\b", text, re.IGNORECASE):
        line_start = text.rfind("\n", 0, match.start()) + 1
        if _NOT_A_TOTAL.search(text[line_start : match.start()]) or _TOTAL_OF_ELSE.match(text[match.end() :]):
            continue
        line, _, rest = text[match.end() :].partition("\n")
        amounts = [a for a in _amounts(line) if a.exact]
        if not amounts and not re.search(r"\w{3}", line):
            # The label may stand alone, with its amount on the next line.
            following = rest.lstrip("\n ").partition("\n")[0]
            if not re.search(r"[^\W\d_]{4}", following):
                amounts = [a for a in _amounts(following) if a.exact]
        if amounts:
            found.append(next((a for a in amounts if a.currency), amounts[-1]))
    return found


# --- Dates --------------------------------------------------------------------------------------------------

_MONTHS: Final = {
    name: number
    for number, names in enumerate(
        (
            "january januar janvier jan",
            "february februar février fevrier feb",
            "march märz mars mar mär",
            "april avril apr",
            "may mai",
            "june juni juin jun",
            "july juli juillet jul",
            "august août aout aug",
            "september septembre sep sept",
            "october oktober octobre oct okt",
            "november novembre nov",
            "december dezember décembre decembre dec dez",
        ),
        start=1,
    )
    for name in names.split()
}
_MONTH = "(?:" + "|".join(sorted(_MONTHS, key=len, reverse=True)) + r")\b\.?"
_DATE = re.compile(
    rf"(?<![\w.,/-])(?:(?P<iso>\d{{4}}-\d{{2}}-\d{{2}})"
    rf"|(?P<d1>\d{{1,2}})(?:st|nd|rd|th|er|\.)? (?P<m1>{_MONTH}),? (?P<y1>\d{{4}})"
    rf"|(?P<m2>{_MONTH}) (?P<d2>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<y2>\d{{4}})"
    rf"|(?P<a>\d{{1,2}})(?P<sep>[./-])(?P<b>\d{{1,2}})(?P=sep)(?P<y3>\d{{4}}|\d{{2}}))(?![\w/-])",
    re.IGNORECASE,
)


def _dates(text: str, *, month_first: bool) -> list[str]:
    """Every date in the text, in order, as YYYY-MM-DD. `month_first` decides 04/05/2025 and the like."""
    found = []
    for match in _DATE.finditer(text):
        if match["iso"]:
            year, month, day = (int(part) for part in match["iso"].split("-"))
        elif name := match["m1"] or match["m2"]:
            year, day = int(match["y1"] or match["y2"]), int(match["d1"] or match["d2"])
            month = _MONTHS.get(name.lower().rstrip("."), 0)
        else:
            first, second, year = int(match["a"]), int(match["b"]), int(match["y3"])
            year += 2000 if year < 100 else 0
            swap = second > 12 or (month_first and match["sep"] != "." and first <= 12)
            month, day = (first, second) if swap else (second, first)
        try:
            found.append(date(year, month, day).isoformat())
        except ValueError:  # 31/02: a number that only looks like a date
            continue
    return found


_DATE_LABELS: Final = {
    "invoice": r"invoice date|date of invoice|rechnungsdatum|date de (?:la )?facture|date d['’]émission",
    "credit_note": r"credit (?:note|memo) date",
    "purchase_order": r"order date|po date|bestelldatum|date de commande",
    "contract": r"effective date|commencement date|dated|vertragsbeginn",
}


def _document_date(kind: str, text: str, mail: _Mail | None, *, month_first: bool) -> str | None:
    labels = [r"(?<!due )(?<!delivery )\bdate|\bdatum"]
    if kind in _DATE_LABELS:
        labels.insert(0, _DATE_LABELS[kind])
    sent = _sent_date(mail)
    if kind in {"support", "reminder", "other"} and sent is not None:
        return sent  # such a mail is dated by its sending; the dates inside it are those of other papers
    for label in labels if kind != "reminder" else []:
        for match in re.finditer(rf"(?:{label})\s*[:.]?\s*", text, re.IGNORECASE):
            if dates := _dates(text[match.end() : match.end() + 24].split("  ")[0], month_first=month_first):
                return dates[0]
    dates = _dates(text, month_first=month_first)
    return sent or (dates[0] if dates else None)


def _sent_date(mail: _Mail | None) -> str | None:
    if mail is None or "date" not in mail.headers:
        return None
    try:
        return parsedate_to_datetime(mail.headers["date"]).date().isoformat()
    except ValueError:
        return None


# --- Parties and references ---------------------------------------------------------------------------------

_SUFFIXES: Final = (
    "GmbH & Co. KG", "GmbH", "AG", "KG", "UG", "SE", "eG", "e.K.", "Pty Ltd", "Ltd.", "Ltd", "Limited", "LLP",
    "LLC", "plc", "PLC", "Inc.", "Inc", "Corp.", "Corp", "SARL", "S.à r.l.", "SAS", "S.A.", "S.p.A.",
    "S.r.l.", "S.L.", "B.V.", "BV", "N.V.", "NV", "ApS", "A/S", "AB", "Oy", "AS",
)  # fmt: skip
_SUFFIX = "|".join(
    re.escape(s) for s in sorted({*_SUFFIXES, *(s.upper() for s in _SUFFIXES)}, key=len, reverse=True)
)
_NAME_WORD = r"(?:(?!\d+\. )[A-Z0-9À-ÖØ-Þ\ufffd][\w'’.&\ufffd-]*|&|and|und|et|of|de|von)"
_COMPANY = re.compile(rf"(?<![\w@.])(?P<name>{_NAME_WORD}(?: {_NAME_WORD}){{0,5}}? (?:{_SUFFIX}))(?![\w@])")
_ADDRESSEE = re.compile(
    r"^\W*(?:to|bill(?:ed)? to|ship to|sold to|client|customer|attn|an|kunde|for the attention)\b",
    re.IGNORECASE,
)
_PARTY_LABELS: Final = {
    "purchase_order": r"buyer|customer|purchaser|besteller|auftraggeber|acheteur|client",
    "invoice": r"supplier|seller|vendor|issued by|from|lieferant|verkäufer|fournisseur|vendeur",
    "credit_note": r"supplier|seller|vendor|issued by|from|lieferant|fournisseur",
}


def _tidy_name(name: str) -> str:
    """`BRANDT FEINMECHANIK GMBH` as `Brandt Feinmechanik GmbH`: letterheads shout, records should compare."""
    name = re.sub(r"\s+", " ", name).strip(" ,;:-")
    if not name.isupper():
        return name
    canonical = {suffix.upper(): suffix for suffix in reversed(_SUFFIXES)}
    return " ".join(canonical.get(w, w if len(w) <= 3 else w.capitalize()) for w in name.split(" "))


def _company(text: str) -> str | None:
    match = _COMPANY.search(text)
    return _tidy_name(match["name"]) if match else None


def _party(kind: str, text: str, mail: _Mail | None) -> str | None:
    if kind == "contract":
        start = re.search(r"\b(?:between|zwischen|entre)\b", text, re.IGNORECASE)
        return _company(text[start.end() :] if start else text) or _company(text)
    if mail is not None:
        return _sender(mail, text)
    if kind in _PARTY_LABELS:
        label = re.compile(
            rf"^\W*(?:{_PARTY_LABELS[kind]})(?: name)?(?: *:| {{2,}})\s*(\S[^\n]*)", re.I | re.M
        )
        if match := label.search(text):
            value = re.split(r" {2,}", match.group(1))[0]
            return _company(value) or _tidy_name(value)[:80] or None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in lines[:4]:
        if _ADDRESSEE.match(line):
            break
        if name := _company(line):
            return name
    first = re.split(r" {2,}", lines[0])[0] if lines else ""
    capitals = all(
        word[0].isupper() or word in {"&", "and", "und", "et", "de", "von"} for word in first.split()
    )
    if (
        2 <= len(first.split()) <= 5
        and capitals
        and not re.search(r"[\d:@]", first)
        and not _is_heading(first)
    ):
        return _tidy_name(first)
    for line in reversed(lines[-8:]):
        if name := _company(line):
            return name
    return None


def _sender(mail: _Mail, text: str) -> str | None:
    shown, address = parseaddr(mail.headers.get("from", ""))
    if not shown:
        return address or None
    if name := _company(shown):
        return name
    # "Tidewater Hosting Billing" signs as "Tidewater Hosting Ltd": the body knows the company's full name.
    for match in _COMPANY.finditer(text):
        if match["name"].split()[:2] == shown.split()[:2]:
            return _tidy_name(match["name"])
    return _tidy_name(shown)


_NO = r"\s*(?:(?:no|nr|number|num|nummer|id)(?![^\W\d_])|n[°º]|#)[.]?\s*[:.#]*\s*"
_NO_OR_NOTHING = rf"(?:{_NO}|(?![\w@])\s*[:.#]*\s*)"
_REF = r"(?P<ref>(?=[\w./-]*\d)[A-Za-z0-9][\w/-]*(?:\.[\w/-]+)*)"
_REFERENCE_LABELS: Final = {
    "invoice": (r"\b(?:invoice|rechnungs?|facture|fattura|factura)",),
    "credit_note": (r"\b(?:credit (?:note|memo)|gutschrifts?|avoir)",),
    "purchase_order": (r"\b(?:purchase order|po|order|bestell(?:ung|nummer)|bon de commande)",),
    "contract": (r"\b(?:agreement|contract|vertrags?)", r"\breference"),
    "reminder": (r"\b(?:invoice|rechnungs?|facture)", r"\border"),
    "support": (r"\b(?:ticket|case|incident)", r"\["),
    "other": (),
}


def _reference(kind: str, text: str) -> str | None:
    # A label with "no." or the like is sure; a bare one ("Purchase Order  4500017832") is the second choice.
    for label in (*_REFERENCE_LABELS[kind], r"\b(?:our|your)? ?ref(?:erence|\.)?"):
        for between, digits in ((_NO, 1), (_NO_OR_NOTHING, 3)):
            for match in re.finditer(rf"{label}{between}{_REF}", text, re.IGNORECASE):
                reference = match["ref"].rstrip("-./")
                if sum(map(str.isdigit, reference)) >= digits and not _dates(reference, month_first=False):
                    return reference
    return None


# --- Kinds and flags ----------------------------------------------------------------------------------------

# In the order in which a tie is settled: credit notes always name an invoice, invoices seldom a credit note.
_KIND_WORDS: Final = {
    "credit_note": r"credit (?:note|memo)\w*|gutschrift\w*|note de crédit|avoir (?:n|sur)",
    "reminder": r"(?:\w+ )?reminder|mahnung|\w*erinnerung|(?:\w+ )?rappel|overdue|past due|überfällig",
    "purchase_order": r"purchase order|bestellung|bon de commande|ordine d['’]acquisto|order total",
    "contract": r"(?:[\w-]{1,30} ){0,3}agreement|(?:[\w-]{1,30} )?contract|\w*vertrag|contrat|hereinafter"
    r"|the parties|effective date",
    "invoice": r"(?:\w+ )?invoice|rechnung\w*|facture|fattura|amount due|total due|net à payer",
    "support": r"support|ticket|help|problem|question|refund|error|offline|not working|anfrage|frage|störung"
    r"|fehler|handbuch|hilfe|garantie|remboursement|panne",
}


def _is_heading(line: str) -> bool:
    return any(re.match(rf"(?:{words})\b", line.strip(), re.IGNORECASE) for words in _KIND_WORDS.values())


def _kind(text: str, mail: _Mail | None) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    subject = re.sub(
        r"^(?:(?:re|aw|fwd?|wg|tr): *)+", "", (mail.headers.get("subject", "") if mail else ""), flags=re.I
    )
    cells = (
        [subject] if mail else [cell for line in lines[:16] for cell in re.split(r" {2,}", line.strip(" -*"))]
    )
    # The text of a letter before any quotation of an earlier one.
    own = "\n".join(line for line in lines if not line.startswith(">"))
    best, best_score = "other", 0
    for kind, words in _KIND_WORDS.items():
        headings = sum(1 for cell in cells if re.match(rf"(?:{words})\b", cell, re.IGNORECASE))
        mentions = len(re.findall(rf"\b(?:{words})\b", own, re.IGNORECASE))
        score = 6 * min(headings, 2) + min(mentions, 4)
        if mail and re.search(rf"\b(?:{words})\b", subject, re.IGNORECASE):
            score += 4
        if (
            mail
            and kind == "support"
            and re.match(r"\W*(?:support|help|service)", mail.headers.get("to", ""), re.I)
        ):
            score += 6
        if score > best_score:
            best, best_score = kind, score
    return best if best_score >= 2 else "other"


@dataclass(slots=True)
class _Reading:
    kind: str = "other"
    party: str | None = None
    reference: str | None = None
    date: str | None = None
    currency: str | None = None
    total: float | None = None
    summary: str = ""
    flags: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "party": self.party,
            "reference": self.reference,
            "date": self.date,
            "currency": self.currency,
            "total": self.total,
            "summary": self.summary,
            "flags": sorted(self.flags),
        }


def extract(text: str) -> dict[str, Any]:
    """What a document says: its kind, party, reference, date (YYYY-MM-DD), currency (ISO 4217), total ..."""
    reading = _Reading()
    text = unwrap(text)
    if not re.search(r"\w", text):
        reading.flags.add("empty")
        reading.summary = "Empty document, nothing to read."
        return reading.as_dict()
    if "\ufffd" in text or re.search(r"Ã[\x80-\xbf]", text):
        reading.flags.add("encoding")
    mail = _split_mail(text)
    body = mail.body if mail else text
    if _INJECTION.search(text):
        reading.flags.add("prompt_injection")
        # What the note claims to be an invoice's total or number must not be read as one.
        body = _without_injection(body)
    if mail is None and _has_ocr_noise(body):
        reading.flags.add("ocr_noise")
        body = _repair_ocr(body)
    body = _plain(body)
    reading.kind = _kind(body, mail)
    own = "\n".join(line for line in body.split("\n") if not line.startswith(">"))
    _read_money(reading, own)
    subject = mail.headers.get("subject", "") if mail else ""
    reading.party = _party(reading.kind, own, mail)
    reading.reference = _reference(reading.kind, f"{subject}\n{own}")
    month_first = bool(re.search(r"\bUSD\b|\$|\b[A-Z]{2} \d{5}\b", own)) and "£" not in own
    reading.date = _document_date(reading.kind, own, mail, month_first=month_first)
    _read_flags(reading, f"{subject}\n{own}")
    reading.summary = _summary(reading, subject, own)
    return reading.as_dict()


def _read_money(reading: _Reading, text: str) -> None:
    if reading.kind in {"support", "other"}:
        return  # sums in a mail that asks for help are hearsay, not a bill
    currencies = Counter(a.currency for a in _amounts(text) if a.currency)
    totals = _totals(text, tier=0) or _totals(text, tier=1)
    if totals:
        reading.total = totals[0].value
        reading.currency = totals[0].currency
    if reading.currency is None and currencies:
        reading.currency = currencies.most_common(1)[0][0]
    if reading.total is None and reading.kind in {"invoice", "credit_note", "purchase_order"}:
        reading.flags.add("total_missing")
    if len(currencies) > 1:
        reading.flags.add("two_currencies")


def _read_flags(reading: _Reading, text: str) -> None:
    def says(pattern: str) -> bool:
        return re.search(pattern, text, re.IGNORECASE) is not None

    kind, flags = reading.kind, reading.flags
    if kind in {"invoice", "reminder"} and says(
        r"\b(?:is|are|now|days?)\s(?:\d+ days? )?overdue|overdue (?:amount|balance|invoice)|past due"
        r"|überfällig|outstanding balance|\bmahnung\b"
    ):
        flags.add("overdue")
    if kind == "reminder" and says(
        r"delivery reminder|lieferer?innerung|overdue deliver|received neither|rückstand"
    ):
        flags.add("late_delivery")
    if says(
        r"bank (?:details|account|data)[^.]{0,60}\b(?:has|have)\s+changed|new (?:bank )?account:"
        r"|bankverbindung[^.]{0,40}geändert|neue bankverbindung|nouvelles? coordonnées bancaires"
    ):
        flags.add("bank_details_changed")
    if kind == "contract" and says(r"automatic(?:ally)?\s+renew|verlängert sich|tacite reconduction"):
        flags.add("auto_renewal")
    if kind == "contract" and says(
        r"(?:liability|indemnity)[^.]{0,60}(?:\.\d[^.]{0,60})?\b(?:is|are|be)\s+unlimited"
    ):
        flags.add("unlimited_liability")
    if kind == "support" and says(
        r"\burgent|\basap\b|\bdringend|\boutage\b|\boffline\b|\bimmédiat|\bdown since\b"
    ):
        flags.add("urgent")


_KIND_NAMES: Final = {
    "invoice": "Invoice",
    "credit_note": "Credit note",
    "contract": "Contract",
    "purchase_order": "Purchase order",
    "support": "Support request",
    "reminder": "Reminder",
    "other": "Document",
}


def _summary(reading: _Reading, subject: str, text: str) -> str:
    parts = [_KIND_NAMES[reading.kind]]
    if reading.reference:
        parts.append(reading.reference)
    if reading.party:
        parts.append(f"from {reading.party}" if reading.kind != "contract" else f"with {reading.party}")
    if reading.date:
        parts.append(f"of {reading.date}")
    if reading.total is not None:
        parts.append(f"over {reading.total:,.2f} {reading.currency or ''}".rstrip())
    line = " ".join(parts)
    if reading.kind in {"support", "other", "reminder"} and (topic := subject or _topic(text)):
        line += f": {topic}"
    return line if len(line) <= 160 else line[:159].rstrip() + "…"


def _topic(text: str) -> str:
    lines = [re.sub(r"\s+", " ", line).strip(" -#*") for line in text.split("\n") if len(line.split()) > 3]
    return next((line for line in lines if _is_heading(line)), lines[0] if lines else "")


# --- Sorting and weighing -----------------------------------------------------------------------------------


def _records(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    records = message.get("records")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError('the user message must be JSON of the form {"records": [{"name": ...}, ...]}')
    return records


def _name(record: Mapping[str, Any], position: int) -> str:
    return str(record.get("name") or f"record {position}")


def _flags(record: Mapping[str, Any]) -> set[str]:
    flags = record.get("flags")
    return {str(f) for f in flags} if isinstance(flags, Iterable) and not isinstance(flags, str) else set()


def _total(record: Mapping[str, Any]) -> float | None:
    total = record.get("total")
    if isinstance(total, str):  # JSON of a Decimal
        try:
            return float(total)
        except ValueError:
            return None
    return float(total) if isinstance(total, int | float) else None


def classify(message: Mapping[str, Any]) -> dict[str, Any]:
    """Where each record belongs and how soon: `{"labels": [{"name", "category", "priority"}]}`, in order."""
    labels = []
    for position, record in enumerate(_records(message), start=1):
        flags, total, kind = _flags(record), _total(record), record.get("kind")
        category, priority = "ignore", "low"
        if kind == "invoice" or (kind == "reminder" and total is not None):
            category = "payable"
            priority = "high" if flags & {"overdue", "bank_details_changed"} else "normal"
        elif kind in {"credit_note", "purchase_order"}:
            category, priority = "receivable", "low" if kind == "credit_note" else "normal"
        elif kind == "contract":
            category = "legal"
            priority = "high" if flags & {"auto_renewal", "unlimited_liability"} else "normal"
        elif kind in {"support", "reminder"}:
            category = "support"
            priority = "high" if flags & {"urgent", "late_delivery", "prompt_injection"} else "normal"
        labels.append({"name": _name(record, position), "category": category, "priority": priority})
    return {"labels": labels}


_FLAG_RISKS: Final = {
    "prompt_injection": ("high", "the text gives orders to whoever processes it"),
    "bank_details_changed": ("high", "asks for payment to a new bank account; call the supplier back"),
    "overdue": ("medium", "payment is overdue"),
    "late_delivery": ("medium", "a delivery is late and a penalty may be due"),
    "two_currencies": ("medium", "amounts in more than one currency"),
    "total_missing": ("medium", "states no total"),
    "ocr_noise": ("medium", "badly scanned, check the figures against the original"),
    "auto_renewal": ("medium", "renews by itself unless notice is given"),
    "unlimited_liability": ("high", "contains a liability without a limit"),
    "urgent": ("medium", "a customer reports an outage"),
    "encoding": ("low", "some characters could not be decoded"),
    "empty": ("low", "nothing to read"),
}
_LARGE: Final = 50_000


def risk(message: Mapping[str, Any]) -> dict[str, Any]:
    """How dangerous each record is and why: `{"risks": [{"name", "level", "reasons"}]}`, in their order.

    The records are looked at together: the same invoice number of the same party twice is a risk of both.
    """
    records = _records(message)
    same_invoice: dict[tuple[str, str] | None, list[int]] = {}
    for position, record in enumerate(records, start=1):
        same_invoice.setdefault(_invoice_identity(record), []).append(position)
    risks = []
    for position, record in enumerate(records, start=1):
        level, reasons = "low", []
        flags = _flags(record)
        for flag, (flag_level, reason) in _FLAG_RISKS.items():
            if flag in flags:
                level = max(level, flag_level, key=LEVELS.index)
                reasons.append(reason)
        identity = _invoice_identity(record)
        twins = [p for p in same_invoice[identity] if p != position] if identity else []
        if twins:
            level = "high"
            names = ", ".join(_name(records[p - 1], p) for p in twins)
            reasons.append(f"the same invoice number is on {names}")
        total = _total(record)
        if total is not None and total >= _LARGE:
            level = max(level, "medium", key=LEVELS.index)
            reasons.append(f"a large amount: {total:,.2f} {record.get('currency') or ''}".rstrip())
        risks.append({"name": _name(record, position), "level": level, "reasons": reasons})
    return {"risks": risks}


def _invoice_identity(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """What two records of one invoice have in common, however its number and supplier are written."""
    if record.get("kind") != "invoice" or not record.get("reference"):
        return None
    party = str(record.get("party") or "").casefold().split()
    return re.sub(r"\W", "", str(record["reference"])).casefold(), party[0] if party else ""
