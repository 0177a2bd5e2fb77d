"""Draw the pictures of the pages about concepts: docs/images/concepts/*.svg.

usage: ./dev run python docs/pictures.py

Each picture has a ground of its own, in a light and a dark version by what the reader's system prefers, so it can be read on
any page. It loads nothing, and says in words (title, desc) what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / "images" / "concepts"

STYLE = """
  .ground { fill: #ffffff; stroke: #c9ced6 }
  .plain { fill: #f2f4f7; stroke: #5b6675 }
  .good { fill: #dff3e4; stroke: #1e7a3c }
  .bad { fill: #fde4e1; stroke: #b3261e }
  .kept { fill: #dfe9fb; stroke: #2456b3 }
  .gone { fill: none; stroke: #5b6675; stroke-dasharray: 5 4 }
  .line { fill: none; stroke: #3a434f; stroke-width: 1.6 }
  .wall { fill: none; stroke: #b3261e; stroke-width: 2; stroke-dasharray: 6 4 }
  .tip { fill: #3a434f }
  text { font: 14px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1a1f26 }
  .small { font-size: 12.5px; fill: #3a434f }
  .head { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #171b21; stroke: #3a434f }
    .plain { fill: #252b34; stroke: #97a3b3 }
    .good { fill: #173a24; stroke: #6fce8d }
    .bad { fill: #4a1d1a; stroke: #ff9b92 }
    .kept { fill: #1a2f57; stroke: #8fb4ff }
    .gone { stroke: #97a3b3 }
    .line { stroke: #c4ccd6 }
    .wall { stroke: #ff9b92 }
    .tip { fill: #c4ccd6 }
    text { fill: #eef1f5 }
    .small { fill: #c4ccd6 }
  }
"""


class Picture:
    """Boxes, arrows and words on a ground, and what they show in words."""

    def __init__(self, name: str, title: str, words: str, width: int, height: int) -> None:
        self.name, self.title, self.words = name, title, words
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: int, y: int, w: int, h: int, lines: str, kind: str = "plain") -> None:
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>')
        texts = lines.split("\n")
        top = y + h / 2 - (len(texts) - 1) * 8.5 + 5
        for number, line in enumerate(texts):
            self.text(x + w // 2, int(top + 17 * number), line, "head" if not number else "small", "middle")

    def text(self, x: int, y: int, line: str, kind: str = "small", anchor: str = "start") -> None:
        self.parts.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(line)}</text>'
        )

    def arrow(
        self, points: Sequence[tuple[int, int]], words: str = "", at: tuple[int, int] | None = None
    ) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline class="line" points="{path}" marker-end="url(#tip)"/>')
        if words:
            x, y = at or (points[0][0] + 6, points[0][1] - 6)
            self.text(x, y, words)

    def rule(self, x1: int, y1: int, x2: int, y2: int, kind: str = "line") -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path class="tip" d="M0 0L8 4L0 8z"/></marker>'
        )
        ground = (
            f'<rect class="ground" x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" rx="10"/>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="t d">'
        named = f'<title id="t">{escape(self.title)}</title>\n<desc id="d">{escape(self.words)}</desc>'
        return "\n".join(
            [head, named, f"<style>{STYLE}</style>", f"<defs>{tip}</defs>", ground, *self.parts, "</svg>", ""]
        )


def attempt() -> Picture:
    p = Picture(
        "attempt",
        "One attempt of a node",
        "The input is validated, the start hook is called, the function runs, its usage is counted, its output is validated, "
        "the output is committed, the success hook is called. An exception or an output that is refused is classified and "
        "recorded, the failure hook is called, and then it is decided: try again after a wait, or stop.",
        860,
        300,
    )
    steps = [
        "input\nvalidated",
        "start\nhook",
        "function\nits timeout",
        "usage\ncounted",
        "output\nvalidated",
        "commit\nkept",
        "success\nhook",
    ]
    kinds = ["plain", "plain", "plain", "plain", "plain", "kept", "good"]
    for number, (step, kind) in enumerate(zip(steps, kinds, strict=True)):
        x = 20 + number * 119
        p.box(x, 40, 105, 56, step, kind)
        if number:
            p.arrow([(x - 14, 68), (x - 2, 68)])
    p.text(20, 26, "An attempt that goes well", "head")
    p.box(258, 180, 105, 56, "classified\n1 of 3 classes", "bad")
    p.box(401, 180, 105, 56, "recorded\nin the trace", "kept")
    p.box(544, 180, 105, 56, "failure\nhook", "bad")
    p.box(687, 180, 150, 56, "decide\npolicy, Retry-After", "plain")
    p.arrow([(310, 96), (310, 178)], "raises, too late", (350, 145))
    p.arrow([(548, 96), (548, 124), (340, 124), (340, 178)], "refused", (556, 120))
    for x in (363, 506, 649):
        p.arrow([(x, 208), (x + 36, 208)])
    p.arrow(
        [(762, 236), (762, 272), (72, 272), (72, 98)], "again, after a wait, with the same input", (200, 264)
    )
    p.arrow([(837, 208), (852, 208)], "", None)
    p.text(762, 170, "or stop", "small")
    return p


def boundary() -> Picture:
    p = Picture(
        "boundary",
        "A contract at a boundary",
        "What node A returns is validated by its output class. What passes is committed and becomes the input of node B, "
        "validated by B's input class. What does not pass stops there: it is not committed, not traced as output, and B is "
        "never called.",
        780,
        220,
    )
    p.box(20, 50, 120, 60, "node A\nreturns a value")
    p.box(200, 50, 150, 60, "output class of A\nvalidates")
    p.box(410, 50, 150, 60, "commit\nthe validated output", "kept")
    p.box(620, 50, 140, 60, "node B\nits input class, too", "good")
    for x in (140, 350, 560):
        p.arrow([(x, 80), (x + 58, 80)])
    p.arrow([(275, 110), (275, 158)], "does not fit", (284, 138))
    p.box(185, 160, 180, 44, "ContractViolation", "bad")
    p.rule(585, 128, 585, 204, "wall")
    p.text(380, 187, "nothing goes past here:")
    p.text(600, 187, "B has not seen it")
    return p


def retry() -> Picture:
    p = Picture(
        "retry",
        "Whether a failed attempt is tried again",
        "A failure has a class. TERMINAL stops the run as FAILED. RECOVERABLE and AMBIGUOUS are tried again while their policy "
        "has retries left, after a delay of at least what the server asked for; a server that asks for more than the policy "
        "allows, or used up retries, stop the run as PARTIAL.",
        800,
        290,
    )
    p.box(20, 115, 130, 56, "a failure\nwith its class")
    p.box(215, 115, 130, 56, "TERMINAL?")
    p.box(410, 115, 130, 56, "retries left?\nby its policy")
    p.box(605, 115, 170, 56, "asked to wait\nlonger than allowed?")
    p.arrow([(150, 143), (213, 143)])
    p.arrow([(345, 143), (408, 143)], "no", (368, 137))
    p.arrow([(540, 143), (603, 143)], "yes", (560, 137))
    p.box(205, 220, 150, 48, "FAILED\npointless to repeat", "bad")
    p.box(485, 220, 220, 48, "PARTIAL\nmay work later, can be resumed", "bad")
    p.arrow([(280, 171), (280, 218)], "yes", (288, 198))
    p.arrow([(475, 171), (475, 244), (483, 244)], "no", (448, 198))
    p.arrow([(690, 171), (690, 218)], "yes", (698, 198))
    p.box(
        225,
        22,
        325,
        48,
        "the next attempt, with the same input\nafter max(backoff, what the server said)",
        "good",
    )
    p.arrow([(690, 115), (690, 46), (552, 46)], "no", (698, 92))
    return p


def resume() -> Picture:
    p = Picture(
        "resume",
        "A run that is resumed",
        "The first process commits the outputs of positions 0 and 1, and dies while position 2 runs. The second process restores "
        "positions 0 and 1 from the journal without calling them, runs position 2 again, and then position 3.",
        780,
        290,
    )
    p.text(20, 66, "first process", "head")
    p.text(20, 236, "second process", "head")
    for number, words in enumerate(("0  read", "1  draft", "2  polish", "3  send")):
        x = 150 + number * 155
        if number < 2:
            p.box(x, 35, 125, 52, f"{words}\ncommitted", "good")
            p.arrow([(x + 62, 87), (x + 62, 124)])
            p.arrow([(x + 62, 166), (x + 62, 204)])
            p.box(x, 206, 125, 52, f"{words}\nnot called", "kept")
        elif number == 2:
            p.arrow([(x + 62, 204), (x + 62, 168)])
            p.box(x, 35, 125, 52, f"{words}\nkill -9", "bad")
            p.box(x, 206, 125, 52, f"{words}\ncalled again", "good")
        else:
            p.arrow([(x + 62, 204), (x + 62, 168)])
            p.box(x, 35, 125, 52, f"{words}\nnever begun", "gone")
            p.box(x, 206, 125, 52, f"{words}\ncalled", "good")
    p.box(150, 126, 590, 38, "the journal: every attempt, every committed output, the usage", "kept")
    return p


def budget() -> Picture:
    p = Picture(
        "budget",
        "A budget that is crossed",
        "Three calls spend up to 80 percent of the limit, where a warning is told. The fourth call takes the run over the limit: "
        "its output is committed, since it is paid for, and the run stops as PARTIAL. The fifth call is never made.",
        830,
        200,
    )
    x = 20
    for number, width in enumerate((150, 170, 140)):
        p.box(x, 60, width, 54, f"call {number + 1}\ncommitted", "good")
        x += width + 4
    p.box(x, 60, 180, 54, "call 4: over the limit\nstill committed", "kept")
    p.box(x + 200, 60, 110, 54, "call 5\nnot made", "gone")
    p.rule(600, 34, 600, 60, "wall")
    p.rule(600, 114, 600, 140, "wall")
    p.text(594, 30, "max_cost_usd", "small", "end")
    p.rule(484, 44, 484, 140, "line")
    p.text(478, 158, "80 %: on_budget_warning", "small", "end")
    p.text(606, 158, "PARTIAL: raise the limit, resume")
    p.text(20, 184, "Usage of failed attempts, and of the processes before a resume, is part of it.")
    return p


def lease() -> Picture:
    p = Picture(
        "lease",
        "One owner, a lease and a fence",
        "The first process owns the run with epoch 1 and commits. It is stopped for longer than its lease. The second process "
        "takes the run over with epoch 2 and commits. When the first one wakes up and writes with epoch 1, the store refuses it: "
        "Fenced.",
        800,
        270,
    )
    p.text(20, 58, "process A", "head")
    p.text(20, 142, "the store", "head")
    p.text(20, 226, "process B", "head")
    p.box(110, 28, 150, 48, "owns it\nepoch 1", "good")
    p.box(280, 28, 260, 48, "stopped\nfor longer than lease_seconds", "gone")
    p.box(560, 28, 220, 48, "wakes up and writes\nepoch 1", "bad")
    p.box(110, 118, 150, 40, "commit, epoch 1", "kept")
    p.box(300, 118, 130, 40, "lease ends", "gone")
    p.box(450, 118, 150, 40, "commit, epoch 2", "kept")
    p.box(640, 118, 140, 40, "Fenced", "bad")
    p.box(370, 200, 240, 48, "takes it over, continues\nepoch 2", "good")
    p.arrow([(185, 76), (185, 116)])
    p.arrow([(525, 200), (525, 160)])
    p.arrow([(365, 158), (365, 224), (368, 224)])
    p.arrow([(710, 76), (710, 116)], "refused", (718, 100))
    return p


def hooks() -> Picture:
    p = Picture(
        "hooks",
        "The order of hooks",
        "Around a run: on_run_start, then for each attempt on_node_start, the function, and exactly one of on_node_success, "
        "on_node_failure, on_node_cancelled and on_node_suspended; between attempts on_node_retry; at last on_run_end. With two "
        "sets a and b, starts run a then b, ends run b then a.",
        900,
        290,
    )
    p.box(20, 30, 122, 190, "on_run_start\na, then b")
    p.box(162, 60, 130, 130, "on_node_start\na, then b")
    p.box(312, 90, 90, 70, "function", "good")
    p.box(
        422,
        60,
        160,
        130,
        "on_node_success\nor on_node_failure\nor on_node_cancelled\nor on_node_suspended\nb, then a",
    )
    p.box(602, 60, 130, 130, "on_node_retry\nbefore the next\nattempt")
    p.box(752, 30, 122, 190, "on_run_end\nb, then a")
    for x in (142, 292, 402, 582, 732):
        p.arrow([(x, 125), (x + 18, 125)])
    p.arrow([(667, 190), (667, 206), (227, 206), (227, 192)])
    p.text(
        20,
        250,
        "A set of hooks opens around those after it and closes in the opposite order, like brackets: a( b( function )b )a.",
    )
    p.text(20, 272, "What a hook raises is logged and listed in result.hook_errors. It changes nothing.")
    return p


PICTURES = (attempt, boundary, retry, resume, budget, lease, hooks)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        picture = draw()
        (FOLDER / f"{picture.name}.svg").write_text(picture.svg(), "utf-8")


if __name__ == "__main__":
    main()
