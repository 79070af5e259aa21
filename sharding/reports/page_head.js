// Helpers, the head of the page, and the step as a waterfall. Text from the plan only ever becomes textContent.
const plan = JSON.parse(document.getElementById("plan").textContent);
const MEMORY_KEYS = plan.memory_names;
const PHASE_KEYS = ["input_dist_s", "lookup_s", "output_dist_s", "gradient_dist_s", "update_s"];
const byId = (id) => document.getElementById(id);
const color = (key) => `var(--c-${key.replaceAll(" ", "-")})`;
const sum = (values) => values.reduce((total, value) => total + value, 0);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Text with commands between backticks, as parts in which these are code.
const withCode = (text) => text.split("`").map((part, index) => (index % 2 ? make("code", {text: part}) : part));

const digits = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : value >= 10 ? value.toFixed(1) : value.toFixed(2));

function size(bytes) {
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (bytes >= unit) return `${digits(bytes / unit)} ${name}`;
  }
  return `${Math.round(bytes)} B`;
}

function count(number) {
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= unit) return digits(number / unit) + name;
  }
  return String(Math.round(number * 100) / 100);
}

function ms(seconds) {
  const value = seconds * 1e3;
  return Math.abs(value) >= 0.1 ? value.toLocaleString("en", {minimumFractionDigits: 2, maximumFractionDigits: 2}) : value.toFixed(3);
}

const percent = (share) => (share !== 0 && Math.abs(share) < 0.01 ? "<1 %" : `${Math.round(share * 100)} %`);
const swatch = (key) => make("span", {class: "swatch", style: {background: color(key)}});
const deviceBytes = (rank) => sum(rank.memory);
const rankSeconds = (rank) => sum(rank.phases);

function largest(items, measure) {
  return items.reduce((best, item) => (measure(item) > measure(best) ? item : best), items[0]);
}

function balance(measure) {
  const mean = sum(plan.ranks.map(measure)) / plan.ranks.length;
  return mean > 0 ? measure(largest(plan.ranks, measure)) / mean : 1;
}

function tile(label, value, unit, detail, share = null) {
  const box = make("div", {class: "tile"}, make("div", {class: "label", text: label}));
  box.append(make("div", {class: "value"}, value, make("small", {text: unit ? ` ${unit}` : ""})));
  if (share !== null) {
    const meter = make("div", {class: share > 1 ? "meter full" : "meter"});
    meter.append(make("i", {style: {width: `${Math.min(1, share) * 100}%`}}));
    box.append(meter);
  }
  box.append(make("div", {class: "detail", text: detail}));
  return box;
}

function drawHead() {
  const machine = plan.machine;
  byId("subtitle").append(...withCode([
    machine.description,
    (plan.num_ranks === 1 ? "1 rank" : `${machine.num_nodes} × ${machine.ranks_per_node} ranks`) +
      (machine.num_groups > 1 ? ` in ${machine.num_groups} groups` : ""),
    `global batch ${plan.batch_size.toLocaleString("en")}`,
    plan.optimizer,
    plan.precision,
  ].join(" · ")));
  const fullest = largest(plan.ranks, deviceBytes), slowest = largest(plan.ranks, rankSeconds);
  const share = machine.usable_memory_bytes ? deviceBytes(fullest) / machine.usable_memory_bytes : 0;
  const weights = sum(plan.tables.map((table) => table.weights));
  const [used, unit] = size(deviceBytes(fullest)).split(" ");
  byId("tiles").append(
    tile("Step, predicted", ms(plan.total_s), "ms", `${Math.round(plan.batch_size / plan.num_ranks).toLocaleString("en")} samples a rank`),
    tile("Samples a second", count(plan.samples_per_s), "", `${count(plan.samples_per_s / plan.num_ranks)} a rank`),
    tile("Fullest rank", used, unit, `rank ${fullest.rank}, ${percent(share)} of usable`, share),
    tile("Memory balance", balance(deviceBytes).toFixed(2), "", "fullest rank over mean"),
    tile("Time balance", balance(rankSeconds).toFixed(2), "", `slowest, rank ${slowest.rank}, over mean`),
    tile("Tables", plan.tables.length.toLocaleString("en"), "", `${size(weights)} with replicas`),
  );
}

function fallRow(name, key, start, seconds, length) {
  const bar = make("i", {style: {left: `${(start / length) * 100}%`, width: `${(Math.abs(seconds) / length) * 100}%`, background: color(key)}});
  if (key === "hidden_s") bar.className = "hidden-part";
  return make("div", {class: key === "total" ? "fall total" : "fall", role: "row"},
    make("span", {class: "name", role: "cell", text: name}),
    make("span", {class: "track", "aria-hidden": "true"}, key === "total" ? make("i", {style: {left: "0", width: `${(seconds / length) * 100}%`, background: "var(--accent)"}}) : bar),
    make("span", {class: "num", role: "cell", text: `${ms(seconds)} ms`}),
    make("span", {class: "num quiet", role: "cell", text: percent(seconds / plan.total_s)}));
}

function drawStep() {
  const length = Math.max(plan.total_s, sum(plan.parts.filter((part) => part.s > 0).map((part) => part.s)));
  let at = 0;
  for (const part of plan.parts) {
    const start = part.s < 0 ? at + part.s : at;
    byId("waterfall").append(fallRow(part.name, part.key, start, part.s, length));
    at += part.s;
  }
  byId("waterfall").append(fallRow("step", "total", 0, plan.total_s, length));
  const families = [
    ["embeddings", PHASE_KEYS], ["dense part", ["dense_s", "all_reduce_s", "dense_optimizer_s"]],
    ["overhead", ["overhead_s"]], ["groups", ["replica_sync_s"]],
  ];
  for (const [name, keys] of families) {
    const seconds = sum(plan.parts.filter((part) => keys.includes(part.key)).map((part) => part.s));
    if (seconds) byId("step-key").append(make("span", {text: `${name} ${ms(seconds)} ms`}));
  }
}
