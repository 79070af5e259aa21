// Stacked bars of ranks: all of them, or a bar for each host (its greatest rank) that opens into its ranks.
const HEIGHT = 260, TOP = 18, BOTTOM = 24, LEFT = 62, RIGHT = 8;
const MIN_BAR = 5, MIN_SCROLLED_BAR = 4, MAX_BAR = 76;

function rankRuns(runs) {
  return runs.map(([first, last]) => (first === last ? String(first) : `${first}-${last}`)).join(",");
}

function niceStep(most, steps, base) {
  const raw = most / steps, power = base ** Math.floor(Math.log(raw) / Math.log(base));
  const factors = base === 2 ? [1, 2] : [1, 2, 5, 10];
  return power * factors.find((factor) => power * factor >= raw * 0.999);
}

class RankChart {
  // options: id, keys, names, measure(rank) -> parts, format, limits [{value, name, soft}], sized (bytes: base 2)
  constructor(options) {
    Object.assign(this, options);
    this.box = byId(`${this.id}-chart`);
    this.hosts = [...new Set(plan.ranks.map((rank) => rank.node))].map((node) => ({node, ranks: plan.ranks.filter((rank) => rank.node === node)}));
    this.total = (rank) => sum(this.measure(rank));
    this.most = this.total(largest(plan.ranks, this.total));
    this.state = {view: "auto", host: null, sorted: false, zoomed: this.limits.length > 0 && this.most < 0.2 * this.limits[0].value};
    this.chosen = largest(plan.ranks, this.total).rank;
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "slider");
    this.box.setAttribute("aria-label", `${this.label}; arrow keys choose, Enter opens a host, Escape goes back`);
    this.box.addEventListener("keydown", (event) => this.onKey(event));
    this.box.addEventListener("click", (event) => this.onClick(event));
    new ResizeObserver(() => this.onResize()).observe(this.box);
    this.draw();
  }

  onResize() {
    if (this.box.clientWidth !== this.drawnWidth) this.draw();
  }

  byHost() {
    if (this.state.host !== null || this.hosts.length < 2) return false;
    if (this.state.view !== "auto") return this.state.view === "hosts";
    return (this.box.clientWidth - LEFT - RIGHT) / plan.ranks.length < MIN_BAR;
  }

  bars() {
    let bars;
    if (this.byHost()) {
      bars = this.hosts.map((host) => ({host, rank: largest(host.ranks, this.total)}));
    } else {
      const ranks = this.state.host === null ? plan.ranks : this.hosts.find((host) => host.node === this.state.host).ranks;
      bars = ranks.map((rank) => ({host: null, rank}));
    }
    return this.state.sorted ? [...bars].sort((a, b) => this.total(b.rank) - this.total(a.rank)) : bars;
  }

  set(changes) {
    Object.assign(this.state, changes);
    this.draw();
  }

  draw() {
    this.drawnWidth = this.box.clientWidth;
    this.shown = this.bars();
    if (this.byHost() || !this.shown.some((bar) => bar.rank.rank === this.chosen)) {
      const node = plan.ranks.find((rank) => rank.rank === this.chosen).node;
      const same = this.shown.find((bar) => bar.rank.node === node);
      this.chosen = (same || largest(this.shown, (bar) => this.total(bar.rank))).rank.rank;
    }
    this.box.innerHTML = this.svg();
    this.drawControls();
    this.drawReadout();
  }

  svg() {
    const room = Math.max(200, this.drawnWidth) - LEFT - RIGHT;
    const slot = Math.min(MAX_BAR * 1.35, Math.max(MIN_SCROLLED_BAR, room / this.shown.length));
    const gap = slot > 12 ? slot * 0.22 : slot > 5 ? 1.5 : 0.5;
    const width = Math.max(LEFT + RIGHT + slot * this.shown.length, Math.min(this.drawnWidth, LEFT + RIGHT + room));
    const limits = this.state.zoomed ? [] : this.limits;
    const top = Math.max(this.most * 1.06, ...limits.map((limit) => limit.value * 1.1)) || 1;
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
    const pieces = [];
    for (let value = 0, step = niceStep(top, this.sized ? 6 : 5, this.sized ? 2 : 10); value <= top; value += step) {
      pieces.push(`<line class="grid" x1="${LEFT}" x2="${width}" y1="${y(value)}" y2="${y(value)}"/><text x="${LEFT - 6}" y="${y(value) + 4}" text-anchor="end">${value ? this.axis(value) : "0"}</text>`);
    }
    const chosenAt = this.shown.findIndex((bar) => bar.rank.rank === this.chosen);
    pieces.push(`<rect class="chosen" x="${LEFT + chosenAt * slot}" y="${TOP - 4}" width="${slot}" height="${HEIGHT - TOP - BOTTOM + 4}" rx="2"/>`);
    this.shown.forEach((bar, index) => {
      const x = LEFT + index * slot;
      let below = 0;
      this.measure(bar.rank).forEach((value, part) => {
        if (value > 0) pieces.push(`<rect x="${(x + gap / 2).toFixed(2)}" y="${y(below + value).toFixed(2)}" width="${(slot - gap).toFixed(2)}" height="${(y(below) - y(below + value)).toFixed(2)}" fill="${color(this.keys[part])}"/>`);
        below += value;
      });
      pieces.push(`<rect class="hit" data-index="${index}" x="${x}" y="${TOP - 4}" width="${slot}" height="${HEIGHT - TOP + 4}"/>`);
    });
    pieces.push(this.labels(slot), ...limits.map((limit) => this.limitLine(limit, width, y)));
    return `<svg width="${width}" height="${HEIGHT}" viewBox="0 0 ${width} ${HEIGHT}" aria-hidden="true">${pieces.join("")}</svg>`;
  }

  // A limit's line and name; the name stands on a plate, so that neither grid nor bars nor the other limit run through it.
  limitLine(limit, width, y) {
    const text = `${limit.name} ${this.format(limit.value)}`, right = Math.min(width, this.drawnWidth) - 6;
    const baseline = y(limit.value) + (limit.soft ? 14 : -5), plate = text.length * 6.4 + 4;
    return `<line class="limit${limit.soft ? " soft" : ""}" x1="${LEFT}" x2="${width}" y1="${y(limit.value)}" y2="${y(limit.value)}"/><rect class="limit-back" x="${right - plate + 2}" y="${baseline - 10}" width="${plate}" height="13" rx="2"/><text class="limit-name" x="${right}" y="${baseline}" text-anchor="end">${text}</text>`;
  }

  labels(slot) {
    const every = Math.max(1, Math.ceil(30 / slot)), steps = [1, 2, 4, 8, 16, 32, 64, 128];
    const step = this.state.sorted ? every : steps.find((value) => value >= every) || 128;
    return this.shown.map((bar, index) => (index % step ? "" : `<text x="${LEFT + (index + 0.5) * slot}" y="${HEIGHT - 7}" text-anchor="middle">${bar.host ? bar.host.node : bar.rank.rank}</text>`)).join("") + `<text x="${LEFT - 6}" y="${HEIGHT - 7}" text-anchor="end">${this.byHost() ? "host" : "rank"}</text>`;
  }

  drawControls() {
    const choice = (name, pressed, changes) => make("button", {type: "button", "aria-pressed": String(pressed), text: name, onclick: () => this.set(changes)});
    const group = (...buttons) => make("span", {class: "group"}, ...buttons);
    const controls = byId(`${this.id}-controls`);
    const focused = [...controls.querySelectorAll("button")].indexOf(document.activeElement);
    controls.replaceChildren();
    if (this.state.host !== null) controls.append(group(choice("← All hosts", false, {host: null})));
    else if (this.hosts.length > 1) controls.append(group(choice("Hosts", this.byHost(), {view: "hosts"}), choice("Ranks", !this.byHost(), {view: "ranks"})));
    if (this.shown.length > 1) controls.append(group(choice("In order", !this.state.sorted, {sorted: false}), choice("By load", this.state.sorted, {sorted: true})));
    if (this.limits.length) controls.append(group(choice("Capacity", !this.state.zoomed, {zoomed: false}), choice("Zoom", this.state.zoomed, {zoomed: true})));
    if (focused >= 0) controls.querySelectorAll("button")[focused]?.focus();
    byId(`${this.id}-note`).textContent = this.note();
  }

  note() {
    const texts = [];
    if (this.byHost()) texts.push("A bar is the greatest rank of a host; choose one to open it.");
    else if (this.state.host !== null) texts.push(`The ranks of host ${this.state.host}.`);
    if (this.state.zoomed) texts.push(`Zoomed: the capacity, ${this.format(this.limits[0].value)}, is ${digits(this.limits[0].value / this.most)} times the fullest rank.`);
    if (plan.machine.num_groups > 1) texts.push(`The first of ${plan.machine.num_groups} groups of ranks, which are alike.`);
    return texts.join(" ") || this.hint;
  }

  drawReadout() {
    const bar = this.shown.find((shown) => shown.rank.rank === this.chosen), rank = bar.rank;
    const isMost = this.total(rank) >= this.most;
    const list = make("dl");
    const parts = this.measure(rank);
    [...this.keys.keys()].reverse().forEach((part) => {
      const quiet = parts[part] ? "" : "zero";
      list.append(make("dt", {class: quiet}, swatch(this.keys[part]), this.names[part]), make("dd", {class: quiet, text: parts[part] ? this.format(parts[part]) : "–"}));
    });
    list.append(make("dt", {class: "sum", text: "together"}), make("dd", {class: "sum", text: this.format(this.total(rank))}));
    if (this.sized && rank.host) list.append(make("dt", {text: "in the host's memory"}), make("dd", {text: size(rank.host)}));
    const held = plan.tables.filter((table) => holds(table, rank.rank)).length;
    const actions = make("div", {class: "actions no-print"});
    if (bar.host && bar.host.ranks.length > 1) actions.append(make("button", {type: "button", text: `Ranks of host ${bar.host.node}`, onclick: () => this.set({host: bar.host.node})}));
    actions.append(make("button", {type: "button", text: held === 1 ? "Its table ↓" : `Its ${held} tables ↓`, onclick: () => showTablesOf(rank.rank)}));
    const word = this.sized ? "the fullest" : "the slowest";
    const title = `Rank ${rank.rank}${this.hosts.length > 1 ? ` on host ${rank.node}` : ""}`;
    byId(`${this.id}-readout`).replaceChildren(make("h3", {text: title}), make("div", {class: "quiet", text: `${isMost ? `${word} · ` : ""}${rank.shards} shard${rank.shards === 1 ? "" : "s"}`}), list, actions);
    const at = this.shown.indexOf(bar);
    const values = {valuemin: 0, valuemax: this.shown.length - 1, valuenow: at, valuetext: `${title}: ${this.format(this.total(rank))}`};
    for (const [name, value] of Object.entries(values)) this.box.setAttribute(`aria-${name}`, value);
  }

  choose(index) {
    this.chosen = this.shown[Math.max(0, Math.min(this.shown.length - 1, index))].rank.rank;
    const kept = this.box.scrollLeft;
    this.draw();
    this.box.scrollLeft = kept;
  }

  onKey(event) {
    const at = this.shown.findIndex((bar) => bar.rank.rank === this.chosen);
    const targets = {ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 8, PageDown: at - 8, Home: 0, End: this.shown.length - 1};
    if (event.key in targets) this.choose(targets[event.key]);
    else if (event.key === "Enter" && this.shown[at].host) this.set({host: this.shown[at].host.node});
    else if (event.key === "Escape" && this.state.host !== null) this.set({host: null});
    else return;
    event.preventDefault();
  }

  onClick(event) {
    const index = event.target.dataset ? event.target.dataset.index : undefined;
    if (index === undefined) return;
    const bar = this.shown[Number(index)];
    const opens = bar.host && bar.host.ranks.length > 1 && bar.rank.rank === this.chosen;
    this.choose(Number(index));
    if (opens) this.set({host: bar.host.node});
  }
}

function drawCharts() {
  const machine = plan.machine;
  const limits = machine.device_memory_bytes ? [{value: machine.device_memory_bytes, name: "capacity", soft: false}, {value: machine.usable_memory_bytes, name: "usable", soft: true}] : [];
  new RankChart({id: "memory", label: "Memory of each rank", keys: MEMORY_KEYS, names: plan.memory_names, measure: (rank) => rank.memory, format: size, axis: size, limits, sized: true, hint: "On the device, at the peak of a step."});
  new RankChart({id: "time", label: "Embedding time of each rank", keys: PHASE_KEYS, names: plan.phase_names, measure: (rank) => rank.phases, format: (value) => `${ms(value)} ms`, axis: (value) => `${Number((value * 1e3).toPrecision(3))} ms`, limits: [], sized: false, hint: "What each rank's shards cost it in a step."});
}
