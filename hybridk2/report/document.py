"""One HTML page that needs nothing else, no network and no script.

Owns what all such pages share: the style, light or dark as the viewer's system is, and the policy
that keeps them from loading or running anything. Knows nothing of what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --soft: #f4f5f9; --line: #e1e2e8; --ink: #1b1c21;
  --quiet: #62656f; --accent: #4353d9; }
@media (prefers-color-scheme: dark) { :root { --page: #16171a; --soft: #1f2125; --line: #2f3238;
  --ink: #e8e9ed; --quiet: #9b9faa; --accent: #8f9bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 64rem; color: var(--ink);
  background: var(--page);
  font: 16px/1.6 system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.25rem; font-size: 1.2rem; }
p { margin: 0.4rem 0; max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: 0.9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem;
  margin: 2rem 0; }
.card { padding: 1.1rem 1.25rem; background: var(--soft); border-radius: 14px; }
.card h3 { margin: 0 0 0.5rem; font-size: 0.9rem; font-weight: 600; color: var(--quiet); }
.card b { font-size: 2rem; line-height: 1.2; font-weight: 650; }
.card div { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
th { font-weight: 600; color: var(--quiet); }
figure { margin: 1.25rem 0 0; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
details { margin-top: 1rem; border-top: 1px solid var(--line); padding-top: 0.75rem; }
summary { cursor: pointer; font-weight: 600; }
a { color: var(--accent); white-space: nowrap; }
tr.chosen { font-weight: 650; }
td.words { text-align: left; white-space: normal; }
dt { font-weight: 600; }
dd { margin: 0 0 0.5rem; color: var(--quiet); }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page. title: plain text. body: HTML, in which names are escaped already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a name may hold: nothing is loaded, nothing runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
