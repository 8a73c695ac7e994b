"use strict";
// The sample browser, out of the JSON in #data.  All text goes in as textContent, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50; // rows of samples on the page at once

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return String(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e\+?/, "e");
  return String(Number(value.toPrecision(4)));
}

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

if (data.samples.rows.length) sampleBrowser(data.samples);
