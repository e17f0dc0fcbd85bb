"""The style sheet of the report, light and dark. ``c0`` to ``c5`` are the colours of the series."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2430; --dim: #667085; --rule: #e4e7ec;
  --c0: #2f6bd8; --c1: #e07b2a; --c2: #17937c; --c3: #a8439b; --c4: #c9a400; --c5: #98a2b3; --mark: #d1293d; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202a; --ink: #e6eaf0; --dim: #97a1b0;
  --rule: #2c3542; --c0: #76a5ff; --c1: #f2a65e; --c2: #53cbb2; --c3: #d68ccc; --c4: #e5c94a; --c5: #6d7888;
  --mark: #ff6b78; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; color: var(--c0); font-weight: 650; letter-spacing: .04em; }
h1 { margin: 0 0 18px; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 30px 0 10px; font-size: 17px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px; margin: 0; }
.tiles div, figure, .scroll, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles div { padding: 10px 14px; }
dt { color: var(--dim); font-size: 13px; }
dd { margin: 0; font-size: 19px; font-weight: 620; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; }
.unit { color: var(--dim); font-weight: 400; font-size: 12.5px; margin-left: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; min-height: 20px; color: var(--dim); font-size: 12.5px; }
.legend.column { flex-direction: column; font-size: 14px; color: var(--ink); gap: 4px; padding-bottom: 10px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.legend i.dashed { height: 0; border-top: 2px dashed var(--mark); border-radius: 0; vertical-align: middle; }
.legend.column span { white-space: nowrap; } .legend.column .note { white-space: normal; color: var(--dim); }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; margin: 14px 0 16px; }
.empty { color: var(--dim); font-style: italic; }
i.c0, .bar .c0 { background: var(--c0); } i.c1, .bar .c1 { background: var(--c1); }
i.c2, .bar .c2 { background: var(--c2); } i.c3, .bar .c3 { background: var(--c3); }
i.c4, .bar .c4 { background: var(--c4); } i.c5, .bar .c5 { background: var(--c5); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--dim); font-size: 10px; font-variant-numeric: tabular-nums; }
svg .c0 { --c: var(--c0); } svg .c1 { --c: var(--c1); } svg .c2 { --c: var(--c2); } svg .c3 { --c: var(--c3); }
svg .c4 { --c: var(--c4); } svg .c5 { --c: var(--c5); }
.grid { stroke: var(--rule); }
.mark { stroke: var(--mark); stroke-dasharray: 4 3; stroke-width: 1.3; }
.curve { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.band { fill: var(--c); opacity: .16; }
.dot, .part { fill: var(--c); }
.hover { fill: var(--ink); opacity: 0; } .hover:hover { opacity: .08; }
.scroll { overflow-x: auto; }
table { width: 100%; min-width: 640px; border-collapse: collapse; table-layout: fixed; }
th, td { padding: 10px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--dim); font-size: 13px; font-weight: 600; }
pre { margin: 0; max-height: 260px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.reward { display: inline-block; margin-bottom: 5px; padding: 0 8px; border-radius: 9px; font-size: 12.5px;
  background: var(--rule); }
details { padding: 12px 14px; margin-top: 30px; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 16px; color: var(--dim); font-size: 12.5px; }
details pre { max-height: none; margin-top: 10px; }
"""
