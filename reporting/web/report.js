"use strict";
// Draws the curves and the sample browser out of the JSON in #data.  All text goes in as textContent, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 8; // --c0 ... --c7 in style.css
const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // the next eight runs are told apart by these
const PAGE = 50; // rows of samples on the page at once

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function drawn(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function written(text, attributes) {
  const node = drawn("text", attributes);
  node.textContent = text;
  return node;
}

const colourOf = (run) => `var(--c${run % COLOURS})`;
const dashOf = (run) => DASHES[Math.floor(run / COLOURS) % DASHES.length];

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return String(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e\+?/, "e");
  return String(Number(value.toPrecision(4)));
}

// ---- Curves ----

// Round numbers in a range, about `count` of them, and their labels with as many digits as tell them apart.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const size = Math.max(Math.abs(low), Math.abs(high));
  const finest = Math.floor(Math.log10(step) + 1e-9);
  const label = (value) => {
    if (size >= 1e-3 && size < 1e6) return value.toFixed(Math.max(0, -finest));
    return value.toExponential(Math.max(0, Math.floor(Math.log10(Math.abs(value)) + 1e-9) - finest)).replace("e+", "e");
  };
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push({ value: i * step, label: i === 0 ? "0" : label(i * step) });
  }
  return found;
}

// From the lowest to the highest value with some room, and never so narrow that rounding errors fill the picture.
function range(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high || (low === 0 && high === 0)) return [0, 1];
  const middle = (low + high) / 2;
  const size = Math.max(Math.abs(low), Math.abs(high));
  const half = low === high ? size * 0.1 : Math.max((high - low) * 0.55, size * 1e-3);
  return [middle - half, middle + half];
}

class Chart {
  constructor(section, { metric, title }) {
    this.counter = section.counter;
    this.metric = metric;
    this.runs = section.runs.filter((run) => metric in run.series);
    this.hidden = section.hidden;
    this.tip = element("div", { className: "tip", hidden: true });
    this.holder = element("div");
    const name = title === metric ? [] : [element("code", { textContent: metric })];
    const caption = element("figcaption", {}, title, ...name);
    this.node = element("figure", { className: "chart" }, caption, this.holder, this.tip);
    this.node.dataset.metric = metric;
    this.holder.addEventListener("pointermove", (event) => this.point(event));
    this.holder.addEventListener("pointerleave", () => this.unpoint());
  }

  draw() {
    const width = this.holder.clientWidth || 400;
    const height = 210;
    const edge = { left: 62, right: 14, top: 8, bottom: 24 };
    const lines = this.runs
      .filter((run) => !this.hidden.has(run.number))
      .map((run) => ({ run, xs: run.series[this.metric][0], ys: run.series[this.metric][1] }));
    const marks = lines.flatMap(({ run }) => [run.best, run.collapse, ...run.alarms].filter((x) => x !== null));
    const xs = lines.flatMap((line) => line.xs).concat(marks);
    let [left, right] = xs.length ? [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))] : [0, 1];
    if (left === right) [left, right] = [left - 1, right + 1];
    const [low, high] = range(lines.flatMap((line) => line.ys.filter((y) => y !== null)));
    const atX = (x) => edge.left + ((x - left) / (right - left)) * (width - edge.left - edge.right);
    const atY = (y) => height - edge.bottom - ((y - low) / (high - low)) * (height - edge.top - edge.bottom);
    const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.metric });

    for (const { value, label } of ticks(low, high, 5)) {
      svg.append(drawn("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: atY(value), y2: atY(value) }));
      svg.append(written(label, { x: edge.left - 6, y: atY(value) + 4, "text-anchor": "end" }));
    }
    for (const { value, label } of ticks(left, right, Math.max(2, Math.floor(width / 70)))) {
      if (Number.isInteger(value)) svg.append(written(label, { x: atX(value), y: height - 7, "text-anchor": "middle" }));
    }
    for (const { run, xs, ys } of lines) {
      const upright = (x) => ({ x1: atX(x), x2: atX(x), y1: edge.top, y2: height - edge.bottom });
      if (run.best !== null) {
        svg.append(drawn("line", { class: "best", ...upright(run.best), style: `stroke:${colourOf(run.number)}` }));
      }
      if (run.collapse !== null) {
        const [x, y] = [atX(run.collapse), edge.top + 5]; // the cross has the colour of the run
        svg.append(drawn("line", { class: "collapse", ...upright(run.collapse) }));
        const cross = `M${x - 5} ${y - 5}l10 10m0 -10l-10 10`;
        svg.append(drawn("path", { class: "cross", d: cross, style: `stroke:${colourOf(run.number)}` }));
      }
      const foot = height - edge.bottom - 9 * lines.findIndex((line) => line.run === run); // a row of triangles a run
      for (const x of run.alarms) {
        svg.append(drawn("path", { class: "alarm", d: `M${atX(x)} ${foot - 8}l4 8h-8z`, style: `fill:${colourOf(run.number)}` }));
      }
      let path = "";
      let pen = "M"; // lifted over a gap: a value that is no number
      for (let i = 0; i < xs.length; i++) {
        if (ys[i] === null) {
          pen = "M";
          continue;
        }
        path += `${pen}${atX(xs[i]).toFixed(1)} ${atY(ys[i]).toFixed(1)}`;
        pen = "L";
        const alone = (i === 0 || ys[i - 1] === null) && (i === ys.length - 1 || ys[i + 1] === null);
        if (alone) svg.append(drawn("circle", { cx: atX(xs[i]), cy: atY(ys[i]), r: 3, style: `fill:${colourOf(run.number)}` }));
      }
      const style = `stroke:${colourOf(run.number)};stroke-dasharray:${dashOf(run.number) || "none"}`;
      svg.append(drawn("path", { class: "line", d: path, style }));
    }
    this.marks = drawn("g");
    svg.append(this.marks);
    this.holder.replaceChildren(svg);
    Object.assign(this, { lines, atX, atY, left, right, edge, width, height });
  }

  point(event) {
    const box = this.holder.getBoundingClientRect();
    const share = (event.clientX - box.left - this.edge.left) / (this.width - this.edge.left - this.edge.right);
    const wanted = this.left + share * (this.right - this.left);
    let nearest = null;
    for (const { xs } of this.lines) {
      for (const x of xs) if (nearest === null || Math.abs(x - wanted) < Math.abs(nearest - wanted)) nearest = x;
    }
    if (nearest === null) return;
    const x = this.atX(nearest);
    this.marks.replaceChildren(
      drawn("line", { class: "cursor", x1: x, x2: x, y1: this.edge.top, y2: this.height - this.edge.bottom }),
    );
    const rows = [`${this.counter} ${shown(nearest)}`];
    for (const { run, xs, ys } of this.lines) {
      const at = xs.lastIndexOf(nearest);
      if (at < 0) continue;
      if (ys[at] !== null) {
        this.marks.append(drawn("circle", { cx: x, cy: this.atY(ys[at]), r: 4, style: `fill:${colourOf(run.number)}` }));
      }
      const dot = element("span", { className: "dot" });
      dot.style.background = colourOf(run.number);
      const name = data.runs.length > 1 ? `${run.name}: ` : "";
      const marks = [run.best === nearest && "best", run.alarms.includes(nearest) && "alarm", run.collapse === nearest && "collapse"];
      const words = marks.filter(Boolean).map((mark) => ` · ${mark}`);
      rows.push(element("div", { className: "value" }, dot, name + shown(ys[at]) + words.join("")));
    }
    this.tip.replaceChildren(...rows);
    this.tip.hidden = false;
    const place = Math.min(x + 14, this.node.clientWidth - this.tip.offsetWidth - 4);
    this.tip.style.left = `${Math.max(4, place)}px`;
    this.tip.style.top = `${this.holder.offsetTop + 14}px`;
  }

  unpoint() {
    this.tip.hidden = true;
    this.marks.replaceChildren();
  }
}

function swatch(run) {
  const svg = drawn("svg", { width: 28, height: 10 });
  const style = `stroke:${colourOf(run)};stroke-width:3;stroke-dasharray:${dashOf(run) || "none"}`;
  svg.append(drawn("line", { x1: 0, x2: 28, y1: 5, y2: 5, style }));
  return svg;
}

const charts = [];

function drawSection(section) {
  section.hidden = new Set(); // numbers of the runs that are switched off
  const own = [];
  const keys = section.runs.map((run) => {
    const marks = [];
    if (run.best !== null) marks.push(`dashed upright line: best, ${section.counter} ${run.best}`);
    if (run.collapse !== null) marks.push(`red line with a cross: collapse, ${section.counter} ${run.collapse}`);
    if (run.alarms.length) marks.push("triangles: alarms");
    const name = marks.length ? `${run.name} (${marks.join("; ")})` : run.name;
    if (section.runs.length === 1) return element("span", { className: "key" }, swatch(run.number), name);
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      if (box.checked) section.hidden.delete(run.number);
      else section.hidden.add(run.number);
      own.forEach((chart) => chart.draw());
    });
    return element("label", { className: "key" }, box, swatch(run.number), name);
  });
  const hint = element("span", { textContent: `over ${section.counter}s; point at a curve for its values` });
  const parts = [element("h2", { textContent: section.title }), element("div", { className: "bar" }, ...keys, hint)];
  for (const group of section.groups) {
    const grid = element("div", { className: "charts" });
    for (const spec of group.charts) {
      const chart = new Chart(section, spec);
      own.push(chart);
      grid.append(chart.node);
    }
    parts.push(element("h3", { textContent: group.title }), grid);
  }
  document.getElementById("curves").append(...parts);
  charts.push(...own);
}

// ---- Samples ----

function sampleBrowser({ columns, rows, prompts }) {
  const RUN = columns.length;
  const PROMPT = RUN + 1;
  const RESPONSE = RUN + 2;
  const place = Object.fromEntries(columns.map((name, number) => [name, number]));
  const several = new Set(rows.map((row) => row[RUN])).size > 1;
  const folded = prompts.map((prompt) => prompt.toLowerCase());
  const texts = rows.map((row) => `${folded[row[PROMPT]]}\n${row[RESPONSE].toLowerCase()}`);
  const state = { words: "", run: null, iteration: null, sort: place.iteration ?? 0, down: true, page: 0, found: [] };

  const search = element("input", { type: "search", placeholder: "text in prompt or reply" });
  search.setAttribute("aria-label", "filter by text");
  const count = element("span");
  count.setAttribute("aria-live", "polite");
  const previous = element("button", { type: "button", textContent: "◀ previous" });
  const next = element("button", { type: "button", textContent: "next ▶" });
  const body = element("tbody");
  const heads = columns.map((name, number) => {
    const button = element("button", { type: "button", textContent: name });
    button.addEventListener("click", () => {
      state.down = state.sort === number ? !state.down : true;
      state.sort = number;
      refresh();
    });
    return element("th", { className: "number", scope: "col" }, button);
  });
  const texthead = (name, kind) => element("th", { className: kind, scope: "col", textContent: name });
  const head = element("tr", {}, ...heads, ...(several ? [texthead("run", "run")] : []), texthead("prompt", ""), texthead("response", ""));
  const table = element("table", { className: "samples" }, element("thead", {}, head), body);

  function choice(label, names, take) {
    const select = element("select", {}, element("option", { value: "", textContent: "all" }));
    select.append(...names.map(([value, name]) => element("option", { value, textContent: name })));
    select.addEventListener("change", () => {
      take(select.value === "" ? null : Number(select.value));
      refresh();
    });
    return element("label", {}, `${label} `, select);
  }

  const choices = [];
  if (several) choices.push(choice("run", data.runs.map((name, number) => [number, name]), (value) => (state.run = value)));
  if ("iteration" in place) {
    const all = [...new Set(rows.map((row) => row[place.iteration]))].sort((a, b) => a - b);
    choices.push(choice("iteration", all.map((value) => [value, String(value)]), (value) => (state.iteration = value)));
  }

  function refresh() {
    const { words, run, iteration, sort, down } = state;
    const found = [];
    for (let i = 0; i < rows.length; i++) {
      if (run !== null && rows[i][RUN] !== run) continue;
      if (iteration !== null && rows[i][place.iteration] !== iteration) continue;
      if (words === "" || texts[i].includes(words)) found.push(i);
    }
    const sign = down ? -1 : 1;
    const low = -Infinity; // rows without the number come last when sorted down
    found.sort((a, b) => sign * ((rows[a][sort] ?? low) - (rows[b][sort] ?? low) || 0) || a - b);
    Object.assign(state, { found, page: 0 });
    heads.forEach((node, number) => {
      const mark = number !== sort ? "" : down ? " ↓" : " ↑";
      node.firstChild.textContent = columns[number] + mark;
      node.setAttribute("aria-sort", number !== sort ? "none" : down ? "descending" : "ascending");
    });
    turn(0);
  }

  function turn(by) {
    state.page += by;
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    const first = state.page * PAGE;
    body.replaceChildren(...state.found.slice(first, first + PAGE).map(rowOf));
    count.textContent = `${state.found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} replies, page ${state.page + 1} of ${pages}`;
    previous.disabled = state.page === 0;
    next.disabled = state.page + 1 >= pages;
  }

  function rowOf(index) {
    const row = rows[index];
    const cells = columns.map((_, number) => element("td", { className: "number", textContent: shown(row[number]) }));
    if (several) cells.push(element("td", { className: "run", textContent: data.runs[row[RUN]] }));
    for (const text of [prompts[row[PROMPT]], row[RESPONSE]]) {
      const inner = element("div", { className: "clamp plain", dir: "auto", textContent: text });
      cells.push(element("td", {}, inner));
    }
    const node = element("tr", { tabIndex: 0 }, ...cells);
    node.addEventListener("click", () => open(index));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter") open(index);
    });
    return node;
  }

  const dialog = element("dialog");
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });

  // The reply in full, and side by side all others to the same prompt, in the order of the iterations.
  function open(index) {
    const prompt = rows[index][PROMPT];
    const same = rows.map((_, i) => i).filter((i) => rows[i][PROMPT] === prompt);
    const when = (i) => rows[i][place.iteration] ?? 0;
    same.sort((a, b) => when(a) - when(b) || a - b);
    const close = element("button", { type: "button", textContent: "close" });
    close.addEventListener("click", () => dialog.close());
    const cards = same.map((i) => {
      const facts = columns.map((name, number) => `${name} ${shown(rows[i][number])}`);
      if (several) facts.unshift(data.runs[rows[i][RUN]]);
      const text = element("div", { className: "plain", dir: "auto", textContent: rows[i][RESPONSE] });
      const card = element("div", { className: "reply" }, element("div", { className: "facts" }, facts.join(" · ")), text);
      card.classList.toggle("chosen", i === index);
      return card;
    });
    dialog.replaceChildren(
      element("div", { className: "bar" }, element("strong", { textContent: `${same.length} ${same.length === 1 ? "reply" : "replies"} to` }), close),
      element("div", { className: "prompt plain", dir: "auto", textContent: prompts[prompt] }),
      element("div", { className: "replies" }, ...cards),
    );
    dialog.showModal();
    dialog.querySelector(".chosen").scrollIntoView({ block: "nearest" });
  }

  search.addEventListener("input", () => {
    state.words = search.value.toLowerCase();
    refresh();
  });
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  const bar = element("div", { className: "bar" }, search, ...choices);
  const pager = element("div", { className: "bar" }, previous, next, count);
  document.getElementById("samples").append(bar, pager, element("div", { className: "scroll" }, table), dialog);
  refresh();
}

// ---- The page ----

data.sections.forEach(drawSection);
const redraw = () => charts.forEach((chart) => chart.draw());
redraw();
let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 100);
});
document.getElementById("only-differences")?.addEventListener("change", (event) => {
  document.querySelector("#record table").classList.toggle("differences", event.target.checked);
});
if (data.samples.rows.length) sampleBrowser(data.samples);
