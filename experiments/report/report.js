"use strict";
const all = (selector, place = document) => [...place.querySelectorAll(selector)];
const read = (place) => JSON.parse(place.querySelector("script[type='application/json']").textContent);

// Colours: as the machine is set, or as chosen; some browsers give files no storage.
const remember = (value) => { try { localStorage.theme = value; } catch { /* for this visit only */ } };
const remembered = () => { try { return localStorage.theme; } catch { return undefined; } };
const paint = (theme) => {
  document.documentElement.dataset.theme = theme;
  for (const b of all("button[data-theme]")) b.setAttribute("aria-pressed", b.dataset.theme === theme);
};
paint(remembered() ?? "auto");
for (const button of all("button[data-theme]")) {
  button.addEventListener("click", () => { paint(button.dataset.theme); remember(button.dataset.theme); });
}

// Tables: a column's first click puts its best values, or the first letters, on top.
const value = (cell) => parseFloat(cell.textContent.replace("−", "-").replace(",", "").replace("<", ""));
const order = (a, b) => {
  const [x, y] = [value(a), value(b)];
  if (Number.isNaN(x) && Number.isNaN(y)) return a.textContent.localeCompare(b.textContent);
  return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : x - y;
};
document.addEventListener("click", ({ target }) => {
  const head = target.closest("table.sorts thead th");
  if (!head || !target.closest("button")) return;
  const table = head.closest("table"), before = head.getAttribute("aria-sort");
  const first = head.dataset.way === "max" ? "descending" : "ascending";
  const next = before === null ? first : before === "ascending" ? "descending" : "ascending";
  for (const th of all("thead th", table)) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", next);
  const sign = next === "ascending" ? 1 : -1, column = head.cellIndex;
  const empty = (row) => row.cells[column].textContent === "";
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => empty(a) - empty(b) || sign * order(a.cells[column], b.cells[column]));
  table.tBodies[0].append(...rows);
});

// Figures.
const views = [];
const tell = (signal, value) => {
  for (const view of views.filter((one) => signal in one.getState().signals)) view.signal(signal, value).runAsync();
};
for (const place of all(".chart")) {
  const options = { renderer: "svg", actions: false, tooltip: { disableDefaultStyle: true } };
  vegaEmbed(place, read(place.parentElement), options).then(({ view }) => {
    views.push(view);
    place.dataset.drawn = "";
  });
}
for (const box of all("[data-line]")) {
  box.addEventListener("change", () => {
    for (const twin of all("[data-line]")) if (twin.dataset.line === box.dataset.line) twin.checked = box.checked;
    tell("hidden", all("[data-line]:not(:checked)").map((one) => one.dataset.line));
  });
}

// Choices.
for (const select of all("[data-picks]")) {
  select.addEventListener("change", () => {
    const kind = select.dataset.picks;
    for (const part of all(`[data-case="${kind}"]`)) part.hidden = part.dataset.name !== select.value;
    tell(kind, select.value);
  });
}

// Utterances: what a system says of each as more and more is missing.
const make = (tag, text, classes = "", attributes = {}) => {
  const made = Object.assign(document.createElement(tag), { className: classes, ...attributes });
  made.append(text);
  return made;
};
for (const place of all(".flips")) {
  const told = read(place), step = 40;
  const [model, which, find] = all(".controls select, .controls input", place);
  const heads = ["utterance", "label", ...told.heads, "flips"];
  const line = document.createElement("tr");
  heads.forEach((text, i) => {
    const th = make("th", make("button", text, "", { type: "button" }), i ? "" : "left", { scope: "col" });
    if (i === heads.length - 1) th.dataset.way = "max";
    line.append(th);
  });
  place.querySelector("thead").append(line);
  const row = (i) => {
    const said = told.answers[model.value][i], values = told.values?.[model.value][i], truth = told.truth[i];
    const tr = document.createElement("tr");
    tr.append(make("th", told.ids[i], "left", { scope: "row" }));
    tr.append(make("td", told.labels ? (told.labels[i] / 100).toFixed(2).replace("-", "−") : told.names[truth]));
    said.forEach((answer, c) => {
      const text = values ? (values[c] / 100).toFixed(1).replace("-", "−") : told.names[answer];
      const flipped = answer !== said[0];
      const title = `${told.names[answer]}: ${answer === truth ? "right" : "wrong"}${flipped ? ", flipped" : ""}`;
      tr.append(make("td", text, `${answer === truth ? "right" : "wrong"}${flipped ? " flip" : ""}`, { title }));
    });
    tr.append(make("td", String(said.filter((answer) => answer !== said[0]).length)));
    return tr;
  };
  let shown = step;
  const list = () => {
    const said = told.answers[model.value], asked = find.value.toLowerCase();
    const tests = {
      all: () => true,
      flip: (i) => said[i].some((answer) => answer !== said[i][0]),
      lost: (i) => said[i][0] === told.truth[i] && said[i].some((answer) => answer !== told.truth[i]),
      won: (i) => said[i][0] !== told.truth[i] && said[i].some((answer) => answer === told.truth[i]),
    };
    const flips = (i) => said[i].filter((answer) => answer !== said[i][0]).length;
    const kept = told.ids.map((_, i) => i).filter((i) => tests[which.value](i) && told.ids[i].toLowerCase().includes(asked));
    kept.sort((a, b) => flips(b) - flips(a));
    place.querySelector("tbody").replaceChildren(...kept.slice(0, shown).map(row));
    for (const th of all("thead th", place)) th.removeAttribute("aria-sort");
    const more = place.querySelector(".more");
    more.replaceChildren(`${Math.min(shown, kept.length)} of ${kept.length} utterances. `);
    if (kept.length > shown) {
      more.append(make("button", "Show more", "", { type: "button", onclick: () => { shown += 5 * step; list(); } }));
    }
  };
  for (const control of [model, which, find]) control.addEventListener("input", () => { shown = step; list(); });
  list();
}
