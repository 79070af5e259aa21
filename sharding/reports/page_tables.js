// The tables: searched, filtered by type and rank, sorted, a page at a time.
const PAGE_ROWS = 50, MAP_WIDTH = 150, MAP_HEIGHT = 12, MIN_MARK = 2;
const seconds = (table) => sum(table.phases);
const rankCount = (table) => sum(table.ranks.map(([first, last]) => last - first + 1));
const holds = (table, rank) => table.ranks.some(([first, last]) => first <= rank && rank <= last);
const mostSeconds = Math.max(...plan.tables.map(seconds), 1e-12);
const KERNEL_SHOWN = plan.tables.some((table) => !["fused", "dense"].includes(table.kernel));
const listing = {sort: "ms", descending: true, page: 0, all: false, rank: null, hiddenTypes: new Set(), words: ""};
const names = new Intl.Collator("en", {numeric: true});

const COLUMNS = [
  {key: "table", value: (table) => table.name, cell: nameCell},
  {key: "rows", number: true, value: (table) => table.rows, cell: (table) => numberCell("rows", count(table.rows), table.rows.toLocaleString("en"))},
  {key: "dim", number: true, value: (table) => table.dim, cell: (table) => numberCell("dim", table.dim)},
  {key: "ids", number: true, value: (table) => table.ids, title: "ids a sample (pooling factor)", cell: (table) => numberCell("ids", count(table.ids), `${table.ids} ids a sample, ${table.pooling}`)},
  {key: "type", value: (table) => table.type, cell: (table) => make("td", {class: "type-cell"}, make("span", {class: "kind"}, swatch(table.type), table.type))},
  ...(KERNEL_SHOWN ? [{key: "kernel", value: (table) => table.kernel, cell: (table) => make("td", {text: kernelName(table)})}] : []),
  {key: "ranks", number: true, left: true, value: rankCount, cell: mapCell},
  {key: "size", number: true, value: (table) => table.weights, title: "weights of all shards", cell: (table) => numberCell("size", size(table.weights), `with optimizer state ${size(table.weights + table.optimizer)}`)},
  {key: "ms", number: true, value: seconds, title: "a step, on its most loaded rank", cell: costCell},
];

function nameCell(table) {
  return make("td", {class: "name", text: table.name, title: `${table.name}: feature ${table.feature} of ${table.module}, ${table.precision}`});
}

function kernelName(table) {
  return table.cache === null ? table.kernel : `${table.kernel} ${table.cache}`;
}

function numberCell(label, text, title = null) {
  return make("td", {class: "num", "data-label": label, text: String(text), title});
}

function mapCell(table) {
  const total = plan.ranks.length, text = rankCount(table) === total && total > 1 ? "all" : rankRuns(table.ranks);
  const marks = table.ranks.map(([first, last]) => {
    const width = Math.max(MIN_MARK, ((last - first + 1) / total) * MAP_WIDTH);
    return `<rect x="${Math.min(MAP_WIDTH - width, (first / total) * MAP_WIDTH).toFixed(2)}" width="${width.toFixed(2)}" height="${MAP_HEIGHT}" fill="${color(table.type)}"/>`;
  });
  const shown = text.length > 16 ? `${rankCount(table)} ranks` : text;
  const strip = make("span", {class: "strip"});
  strip.innerHTML = `<svg width="${MAP_WIDTH}" height="${MAP_HEIGHT}" aria-hidden="true"><rect width="${MAP_WIDTH}" height="${MAP_HEIGHT}" rx="2" fill="var(--track)"/>${marks.join("")}</svg>`;
  strip.append(make("span", {class: "ranks", text: shown}));
  const cell = make("td", {class: "map", title: `ranks ${rankRuns(table.ranks)}`}, strip);
  return cell;
}

function costCell(table) {
  const stack = make("span", {class: "stack", "aria-hidden": "true"});
  table.phases.forEach((value, part) => {
    if (value > 0) stack.append(make("i", {style: {width: `${(value / mostSeconds) * 100}%`, background: color(PHASE_KEYS[part])}}));
  });
  const title = table.phases.map((value, part) => `${plan.phase_names[part]} ${ms(value)}`).join(", ");
  return make("td", {class: "num cost-cell", "data-label": "ms", title}, make("span", {class: "cost"}, stack, make("span", {class: "figure", text: ms(seconds(table))})));
}

function chosenTables() {
  const words = listing.words.toLowerCase().split(/\s+/).filter(Boolean);
  const column = COLUMNS.find((candidate) => candidate.key === listing.sort), sign = listing.descending ? -1 : 1;
  return plan.tables
    .filter((table) => !listing.hiddenTypes.has(table.type))
    .filter((table) => listing.rank === null || holds(table, listing.rank))
    .filter((table) => words.every((word) => `${table.name} ${table.feature} ${table.module} ${table.kernel}`.toLowerCase().includes(word)))
    .sort((a, b) => {
      const [left, right] = [column.value(a), column.value(b)];
      return sign * (typeof left === "number" ? left - right : names.compare(left, right)) || names.compare(a.name, b.name);
    });
}

function drawTables() {
  const tables = chosenTables(), pages = Math.max(1, Math.ceil(tables.length / PAGE_ROWS));
  listing.page = Math.min(listing.page, pages - 1);
  const first = listing.all ? 0 : listing.page * PAGE_ROWS;
  const shown = listing.all ? tables : tables.slice(first, first + PAGE_ROWS);
  const body = byId("tables").tBodies[0];
  body.replaceChildren(...shown.map((table) => make("tr", {}, ...COLUMNS.map((column) => column.cell(table)))));
  if (!tables.length) body.append(make("tr", {}, make("td", {class: "empty", colspan: COLUMNS.length, text: "No table matches."})));
  for (const [index, column] of COLUMNS.entries()) {
    const head = byId("tables").tHead.rows[0].cells[index], isSorted = column.key === listing.sort;
    if (isSorted) head.setAttribute("aria-sort", listing.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    head.firstChild.textContent = column.key + (isSorted ? (listing.descending ? " ↓" : " ↑") : "");
  }
  drawPager(tables.length, first, shown.length, pages);
}

function drawPager(total, first, shown, pages) {
  const turn = (text, page) => make("button", {type: "button", text, ...(page < 0 || page >= pages ? {disabled: ""} : {}), onclick: () => { listing.page = page; drawTables(); }});
  const range = shown ? `${first + 1}–${first + shown} of ${total.toLocaleString("en")}` : "none";
  const filtered = total < plan.tables.length ? ` (of ${plan.tables.length.toLocaleString("en")} in all)` : "";
  byId("pager").replaceChildren(make("span", {class: "quiet", "aria-live": "polite", text: range + filtered}));
  if (total <= PAGE_ROWS) return;
  if (!listing.all) byId("pager").append(turn("← Previous", listing.page - 1), turn("Next →", listing.page + 1));
  byId("pager").append(make("button", {type: "button", text: listing.all ? "In pages" : "Show all", onclick: () => { listing.all = !listing.all; drawTables(); }}));
}

function drawFilters() {
  const counts = new Map();
  for (const table of plan.tables) counts.set(table.type, (counts.get(table.type) || 0) + 1);
  for (const [type, number] of [...counts].sort((a, b) => b[1] - a[1])) {
    const chip = make("button", {type: "button", "aria-pressed": "true"}, swatch(type), type, make("span", {class: "number", text: String(number)}));
    chip.addEventListener("click", () => {
      const hides = !listing.hiddenTypes.has(type);
      listing.hiddenTypes[hides ? "add" : "delete"](type);
      chip.setAttribute("aria-pressed", String(!hides));
      listing.page = 0;
      drawTables();
    });
    byId("type-chips").append(chip);
  }
  byId("search").addEventListener("input", (event) => { listing.words = event.target.value; listing.page = 0; drawTables(); });
  byId("tables").tHead.append(make("tr", {}, ...COLUMNS.map((column) => make("th", {class: column.number && !column.left ? "num" : "", scope: "col", title: column.title}, make("button", {type: "button", onclick: () => sortBy(column)})))));
}

function sortBy(column) {
  const isSorted = listing.sort === column.key;
  listing.descending = isSorted ? !listing.descending : Boolean(column.number);
  Object.assign(listing, {sort: column.key, page: 0});
  drawTables();
}

function showTablesOf(rank) {
  Object.assign(listing, {rank, page: 0});
  byId("rank-filter").replaceChildren();
  if (rank !== null) {
    byId("rank-filter").append(make("button", {type: "button", text: `on rank ${rank} ✕`, "aria-label": `Show the tables of all ranks, not of rank ${rank} only`, onclick: () => showTablesOf(null)}));
    byId("tables-title").scrollIntoView({behavior: "smooth", block: "start"});
  }
  drawTables();
}
