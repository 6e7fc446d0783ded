"""The style sheet of a run's report; light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
        --page: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f5f7f9;
        --good: #1a7f37; --bad: #cf222e; --accent: #0a5fc4;
        --c0: #0a5fc4; --c1: #c2410c; --c2: #17803d; --c3: #8a3ffc; --c4: #0e7490; --c5: #8a6100; --c6: #c11574;
        --c7: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e4e9ee; --soft: #97a3af; --line: #2c343d; --band: #171d24;
          --good: #4cc26a; --bad: #ff7b72; --accent: #6cb0ff;
          --c0: #6cb0ff; --c1: #ff9a5c; --c2: #4cc26a; --c3: #c29bff; --c4: #3fc1d6; --c5: #e0b040; --c6: #ff7ab8;
          --c7: #9ca3af; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 0 0 6px; }
h3 { font-size: 15px; margin: 0 0 4px; }
section { border-top: 1px solid var(--line); margin-top: 32px; padding-top: 24px; }
.lead { margin: 0 0 16px; max-width: 84ch; color: var(--soft); }
.state { font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; margin: 14px 0 18px; }
.tile { margin: 0; padding: 12px 16px; background: var(--band); border-radius: 8px; color: var(--soft);
        font-size: 14px; overflow-wrap: anywhere; }
.tile b { display: block; color: var(--accent); font-size: 25px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile b.good { color: var(--good); }
.tile b.bad { color: var(--bad); }
.tile.wide { grid-column: span 2; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 26px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; line-height: 1.4; color: var(--soft); margin-top: 4px; }
svg.plot { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
svg.plot text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; padding: 0; list-style: none; font-size: 13px;
          color: var(--soft); overflow-wrap: anywhere; }
.swatch { width: 24px; height: 8px; margin-right: 6px; vertical-align: middle; }
.dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin: 0 8px; background: var(--bad); }
.box { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; vertical-align: -1px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(328px, 100%), 1fr)); gap: 22px 24px; }
.cards.broad { grid-template-columns: 1fr; }
.card { min-width: 0; }
.card > p { margin: 0 0 6px; font-size: 14.5px; line-height: 1.35; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 10px; }
.shot { width: 160px; font-size: 12.5px; line-height: 1.4; color: var(--soft); }
.shot img, .shot .none { display: block; max-width: 100%; height: auto; outline: 1px solid var(--line); }
.shot img.small { image-rendering: pixelated; }
.shot .none { padding: 68px 0; text-align: center; }
.shot b { display: block; font-weight: 600; }
.shot dl { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: 0 8px; margin: 2px 0 0; }
.shot dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.shot dd { margin: 0; color: var(--ink); font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); text-align: left; vertical-align: bottom; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td { vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
details summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
td.key { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; width: 34%; }
.note { font-size: 13px; color: var(--soft); margin: 8px 0 0; max-width: 92ch; }
@media (max-width: 640px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 25px; }
  .tile b.good { color: var(--good); }
.tile b.bad { color: var(--bad); }
.tile.wide { grid-column: auto; }
}
@media print { details > * { display: block; } }
"""
