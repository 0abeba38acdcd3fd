"""The page's style: one column of text, figures in a grid that folds on a phone, light and dark paper."""

from qtale_jax.reporting.labels import DARK, INK, MUTED, PAPER, RULE, SERIES


def _variables(ink: str, muted: str, rule: str, paper: str, shade: int) -> str:
    series = "".join(f"--series-{index}:{colours[shade]};" for index, colours in enumerate(SERIES))
    return f"--ink:{ink};--muted:{muted};--rule:{rule};--paper:{paper};{series}"


STYLESHEET = (
    f":root{{color-scheme:light dark;{_variables(INK, MUTED, RULE, PAPER, 0)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(**DARK, shade=1)}}}}}\n"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
  font-size:16px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:72rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:clamp(1.7rem,1.2rem + 2vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .6rem;
  text-wrap:balance}
h2{font-size:1.4rem;line-height:1.25;letter-spacing:-.01em;margin:4rem 0 .5rem;padding-top:1.1rem;
  border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:2.2rem 0 .3rem}
h3+.scroll{margin-top:.5rem}
p{max-width:68ch;margin:.5rem 0}
a{color:inherit;text-decoration-color:var(--muted);text-underline-offset:.2em}
.lead{font-size:1.1rem;color:var(--muted)}
nav{margin:1.4rem 0 0;display:flex;flex-wrap:wrap;gap:.35rem 1.3rem;font-size:.92rem}
figure{margin:1.5rem 0 2.4rem}
figcaption,.note{color:var(--muted);font-size:.88rem;max-width:78ch;margin:.7rem 0 0}
figcaption b{color:var(--ink);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;margin:0 0 .9rem;padding:0;list-style:none;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend svg{display:block}
.panels{display:grid;gap:1.4rem;--share:calc((100% - (var(--columns) - 1)*1.4rem)/var(--columns));
  grid-template-columns:repeat(auto-fill,minmax(min(100%,max(15rem,var(--share))),1fr))}
.panels svg{display:block;width:100%;height:auto;max-width:22rem}
.panels.wide svg{max-width:33rem}
.panels svg text{font-family:inherit!important}
.scroll{overflow-x:auto;margin:1.1rem 0 0;-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid var(--series-2);outline-offset:3px}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;line-height:1.35}
th,td{padding:.38rem .95rem .38rem 0;text-align:left;white-space:nowrap;vertical-align:baseline}
th.n,td.n{text-align:right;padding:.38rem 0 .38rem 1.25rem}
thead th{color:var(--muted);font-weight:500;border-bottom:1px solid var(--muted)}
tbody th{font-weight:600}
tbody tr.break>*{border-top:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:1px solid var(--muted)}
tbody tr:hover>*{background:color-mix(in srgb,var(--rule) 45%,transparent)}
td small{color:var(--muted);font-size:.86em;margin-left:.15em}
.same{color:transparent}
.examples{display:flex;flex-wrap:wrap;gap:2.2rem 3.6rem;margin:1rem 0 0}
.maps{display:flex;flex-wrap:wrap;gap:1.4rem 1.8rem;margin:0;max-width:100%}
.map{max-width:100%;min-width:0}
.map h4{font-size:.88rem;font-weight:500;margin:0 0 .4rem;color:var(--muted)}
.map h4 b{font-weight:600;color:var(--ink)}
.map .scroll{margin:0}
.map svg{display:block;font-family:inherit}
.map rect:hover{stroke:var(--ink);stroke-width:1.5}
pre{background:color-mix(in srgb,var(--rule) 38%,transparent);border-radius:6px;padding:.85rem 1rem;overflow-x:auto;
  font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;max-width:100%}
details{margin:.8rem 0}
summary{cursor:pointer;font-size:.92rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.4rem;font-size:.92rem;margin:1rem 0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:66rem){.panels{--columns:2!important}}
@media (max-width:40rem){main{padding:2rem 1.1rem 3rem}h2{margin-top:3rem}table{font-size:.86rem}
  tbody th:first-child,thead th:first-child{position:sticky;left:0;background:var(--paper)}
  dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
@media print{nav{display:none}.panels,figure,table{break-inside:avoid}}
"""
)
