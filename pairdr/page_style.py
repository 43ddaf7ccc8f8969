"""The frame and the style of a page that stands alone: nothing is fetched, nothing is run, light and dark."""

from __future__ import annotations

from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f5f6f8; --rule: #d5d9de; --ink: #1a1d21; --soft: #57606a;
  --good: #176f37; --bad: #a32a1d; --c0: #1260b8; --c1: #b4530a; --c2: #1a7a3c; --c3: #7b3fb0; --c4: #69727c; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --panel: #1b2026; --rule: #363d45; --ink: #e6e8eb;
  --soft: #9aa4af; --good: #63c884; --bad: #f08a7d; --c0: #6db0f5; --c1: #f0a35e; --c2: #6ccb8c; --c3: #c59bf0;
  --c4: #a3adb8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 1.2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .2rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--soft); font-weight: 600; }
p { margin: .4rem 0; }
a { color: var(--c0); }
.soft, .how, figcaption, .legend, dt { color: var(--soft); }
.how { margin: 0 0 .9rem; }
.absent { border-left: 3px solid var(--rule); padding: .3rem .8rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .8rem 0 0; }
.verdict { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; font-size: .88rem; color: var(--soft); }
.number { text-align: right; }
td.number { white-space: nowrap; }
tr.main td { font-weight: 650; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.6rem;
  margin: .8rem 0; }
figure { margin: 0; min-width: 0; max-width: 34rem; }
figcaption { font-size: .9rem; margin-bottom: .2rem; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12.5px; fill: var(--soft); font-family: inherit; font-variant-numeric: tabular-nums; }
svg text.mark { fill: var(--ink); }
svg line.grid { stroke: var(--rule); stroke-width: 1; }
svg line.axis { stroke: var(--soft); stroke-width: 1; }
svg line.mark { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 3 3; }
polyline, svg line.l0, svg line.l1, svg line.l2, svg line.l3, svg line.l4 { fill: none; stroke-width: 2; }
.l0 { stroke: var(--c0); } .l1 { stroke: var(--c1); stroke-dasharray: 7 3; }
.l2 { stroke: var(--c2); stroke-dasharray: 2 3; }
.l3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; } .l4 { stroke: var(--c4); stroke-dasharray: 1 4; }
.a0 { fill: var(--c0); } .a1 { fill: var(--c1); } .a2 { fill: var(--c2); } .a3 { fill: var(--c3); }
.a4 { fill: var(--c4); }
polygon { fill-opacity: .12; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; margin: .1rem 0 0; }
.key { width: 22px; height: 10px; margin-right: .4rem; vertical-align: middle; }
.bar { display: inline-block; height: .6rem; min-width: 1px; background: var(--c0); }
.change { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; margin: .7rem 0; }
.change h3 { margin: 0 0 .1rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem 1.4rem;
  margin-top: .6rem; font-size: .9rem; }
.columns > div { min-width: 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; }
code { font-size: .88em; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .6rem 0; }
ul { padding-left: 1.2rem; }
@media (max-width: 34rem) { table { font-size: .88rem; } th { font-size: .8rem; } th, td { padding: .25rem .4rem; } }
"""

_CONTROL = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")


def write_text(text: object) -> str:
    """Return a text as it may stand in a page, shown literally: escaped, and without control characters."""
    return escape(str(text).translate(_CONTROL).encode("utf-8", "replace").decode("utf-8"))


def frame_page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{write_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def make_table(head: list[str], rows: list[list[str]], *, main: int | None = None, texts: int = 1) -> str:
    """Return a table that scrolls by itself where it is wider than the page.

    Args:
        head: plain text.
        rows: cells of HTML.
        main: the row that is set off.
        texts: columns of text; those after them are numbers, to the right.
    """

    def row(cells: list[str], tag: str) -> str:
        kinds = ["" if at < texts else ' class="number"' for at in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    marked = ["", ' class="main"']
    lines = [f"<tr{marked[at == main]}>{row(cells, 'td')}</tr>" for at, cells in enumerate(rows)]
    top = f"<thead><tr>{row([write_text(cell) for cell in head], 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def make_facts(facts: dict[str, str], *, numbers: bool = True) -> str:
    """Return names and values, plain text both, as a table without a head; what is no number may be broken."""
    before, after = ('<td class="number">', "</td>") if numbers else ("<td><code>", "</code></td>")
    lines = "".join(
        f"<tr><td>{write_text(name)}</td>{before}{write_text(value)}{after}</tr>" for name, value in facts.items()
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
