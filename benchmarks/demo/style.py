"""The style sheet of the report."""

STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f5f7f9;
        --good: #1a7f37; --bad: #cf222e; --accent: #0a5fc4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e4e9ee; --soft: #97a3af; --line: #2c343d; --band: #171d24;
          --good: #4cc26a; --bad: #ff7b72; --accent: #6cb0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 0 0 6px; }
header p { margin: 0 0 10px; max-width: 72ch; color: var(--soft); }
section { border-top: 1px solid var(--line); margin-top: 36px; padding-top: 26px; }
.lead { margin: 0 0 16px; max-width: 76ch; color: var(--soft); }
header .state { font-weight: 600; }
header .state.good, .good td[data-label^="oracle exact"], .good td[data-label="candidate"] { color: var(--good); }
header .state.bad, .failure { color: var(--bad); }
.failure { font-weight: 600; margin: 0 0 10px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 18px; }
.fact { flex: 1 1 220px; margin: 0; padding: 12px 16px; background: var(--band); border-radius: 8px;
        color: var(--soft); font-size: 14px; }
.fact b { display: block; color: var(--accent); font-size: 26px; line-height: 1.25;
          font-variant-numeric: tabular-nums; }
.figures { display: flex; flex-wrap: wrap; gap: 24px; margin: 0 0 18px; }
figure { margin: 0; max-width: 100%; }
figure img { width: 100%; display: block; border-radius: 6px; border: 1px solid var(--line);
             image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.4; color: var(--soft); margin-top: 6px; }
.scroll { overflow-x: auto; }
td[data-label="oracle's reason"] { font-size: 13.5px; min-width: 220px; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; }
caption { text-align: left; font-weight: 600; padding: 4px 0 8px; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); text-align: left; vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
td { vertical-align: middle; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
.picture { width: 124px; }
.picture img { display: block; max-width: 112px; max-height: 96px; border-radius: 4px; border: 1px solid var(--line); }
td[data-label="code"] { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
.note + .scroll { margin-top: 26px; }
.note { font-size: 13px; color: var(--soft); margin: 8px 0 0; max-width: 84ch; }
footer { border-top: 1px solid var(--line); margin-top: 36px; padding-top: 16px; }
.about { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 13px;
         color: var(--soft); }
.about dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 25px; }
  table.pictures, table.pictures tbody { display: block; }
  table.pictures thead { display: none; }
  table.pictures tr { display: grid; grid-template-columns: 104px 1fr; column-gap: 14px; padding: 12px 0;
                      border-bottom: 1px solid var(--line); }
  table.pictures td { display: flex; justify-content: space-between; gap: 12px; grid-column: 2; padding: 1px 0;
                      border: 0; text-align: right; white-space: normal; }
  table.pictures td.picture { grid-column: 1; grid-row: 1 / span 12; width: auto; align-items: start; }
  table.pictures td.picture::before { content: none; }
  table.pictures td.picture img { max-width: 104px; }
  table.pictures td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  table.pictures caption { display: block; }
  table.pictures td[data-label="candidate"] { order: -1; justify-content: flex-start; font-weight: 600; }
  table.pictures td.picture { order: -2; }
  table.pictures td[data-label="candidate"]::before { content: none; }
  table.pictures td[data-label="oracle's reason"] { display: block; text-align: left; font-size: 13.5px; }
  table.pictures td[data-label="oracle's reason"]::before { content: none; }
}
"""
