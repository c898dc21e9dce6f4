"use strict";
// Text is set with textContent alone: prompts and labels are untrusted.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const SMALL = 48, LARGE = 160; // smallest sides of a picture in a grid and beside it

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A picture of a sheet, as the element's background. place: row, column, rows, columns.
function tile(sheet, place, side, label) {
  const height = data.tile.height, width = data.tile.width;
  const exact = side / Math.max(height, width);
  const scale = data.tile.pixels ? Math.max(1, Math.round(exact)) : Math.min(exact, 1.6);
  const made = element("span", { class: "tile", role: "img", "aria-label": label });
  if (data.tile.pixels) made.classList.add("pixels");
  const w = Math.round(width * scale), h = Math.round(height * scale);
  made.style.width = w + "px";
  made.style.height = h + "px";
  made.style.backgroundImage = "url(" + sheet + ")";
  made.style.backgroundSize = w * place.columns + "px " + h * place.rows + "px";
  made.style.backgroundPosition = -w * place.column + "px " + -h * place.row + "px";
  return made;
}

// A grid of all models and columns, and the chosen column enlarged beside it.
// view: table, large, heads (elements of the columns), names (of the columns), choose(column).
function show(view, sheet, chosen) {
  const rows = data.labels.length, columns = view.names.length;
  const head = element("tr", null, element("td"));
  view.names.forEach((name, c) => head.append(view.head(name, c, c === chosen)));
  const body = element("tbody");
  const large = [];
  data.labels.forEach((label, row) => {
    const line = element("tr", { class: "model-" + (row % 8) });
    line.append(element("th", { scope: "row" }, label));
    for (let column = 0; column < columns; column++) {
      const place = { row, column, rows, columns };
      const text = label + ", " + view.names[column];
      const cell = element("td", null, tile(sheet, place, view.side, text));
      if (column === chosen) cell.className = "on";
      cell.addEventListener("click", () => view.choose(column));
      line.append(cell);
      if (column === chosen) {
        const figure = element("figure", { class: "model-" + (row % 8) });
        figure.append(tile(sheet, place, LARGE, text), element("figcaption", null, label));
        large.push(figure);
      }
    }
    body.append(line);
  });
  view.table.replaceChildren(element("thead", null, head), body);
  view.large.replaceChildren(...large);
}

function options(select, texts) {
  select.replaceChildren(...texts.map((text, i) => element("option", { value: i }, text)));
}

// The same noise through every model.
const picture = { prompt: 0, seed: 0, sort: 0 };
const seeds = {
  table: byId("seeds"), large: byId("large-seed"), names: data.seeds,
  side: data.tile.pixels ? 64 : 96,
  head(name, column, checked) {
    const input = element("input", { type: "radio", name: "seed", value: column });
    input.checked = checked;
    input.addEventListener("change", () => seeds.choose(column));
    return element("th", { scope: "col" }, element("label", null, input, name));
  },
  choose(column) {
    const focused = document.activeElement && document.activeElement.name === "seed";
    picture.seed = column;
    showPicture();
    if (focused) seeds.table.querySelector("input:checked").focus();
  },
};

function showPicture() {
  const prompt = data.prompts[picture.prompt];
  if (!prompt) return;
  byId("prompt").textContent = prompt.text;
  show(seeds, prompt.sheet, picture.seed);
}

function listPrompts() {
  const student = data.students[picture.sort];
  const apart = (prompt) => (student === undefined ? null : prompt.apart[student]);
  const order = data.prompts.map((_, i) => i);
  if (student !== undefined) {
    order.sort((a, b) => apart(data.prompts[b]) - apart(data.prompts[a]) || a - b);
  }
  const most = Math.max(1, ...data.prompts.map((prompt) => apart(prompt) || 0));
  byId("prompts").replaceChildren(element("legend", { class: "hidden" }, "Prompt"));
  order.forEach((index, position) => {
    const prompt = data.prompts[index];
    const input = element("input", { type: "radio", name: "prompt", value: index });
    input.checked = position === 0;
    input.addEventListener("change", () => {
      picture.prompt = index;
      showPicture();
    });
    const label = element("label", null, input, element("span", { class: "name" }, prompt.text));
    if (apart(prompt) !== null) {
      label.append(element("span", { class: "apart" }, apart(prompt).toFixed(2)));
      label.append(element("meter", { min: 0, max: most, value: apart(prompt), "aria-hidden": "true" }));
    }
    byId("prompts").append(label);
  });
  picture.prompt = order.length ? order[0] : 0;
  showPicture();
}

const names = data.students.map((row) => "difference of " + data.labels[row]);
options(byId("sort"), names.length ? names : ["order of the file"]);
byId("sort").addEventListener("change", (event) => {
  picture.sort = Number(event.target.value);
  listPrompts();
});
byId("count").textContent = data.prompts.length === data.total
  ? data.total + " prompts"
  : data.prompts.length + " of " + data.total
    + " prompts: those that differ most, and an even selection of the others";
listPrompts();

// Between noises.
if (data.strips.length) {
  const way = { prompt: 0, name: "path", step: 0 };
  const slider = byId("step");
  const steps = {
    table: byId("steps"), large: byId("large-step"), names: [], side: SMALL,
    head: (name, _, on) => element("th", { scope: "col", class: on ? "on" : "" }, name),
    choose(column) {
      way.step = column;
      slider.value = column;
      showWay();
    },
  };
  const showWay = () => {
    steps.names = data.steps[way.name];
    slider.max = steps.names.length - 1;
    slider.setAttribute("aria-valuetext", steps.names[way.step]);
    byId("step-name").textContent = steps.names[way.step];
    show(steps, data.strips[way.prompt].sheets[way.name], way.step);
  };
  options(byId("way-prompt"), data.strips.map((strip) => strip.text));
  byId("way-prompt").addEventListener("change", (event) => {
    way.prompt = Number(event.target.value);
    showWay();
  });
  byId("way").addEventListener("change", (event) => {
    way.name = event.target.value;
    way.step = way.name === "path" ? 0 : (data.steps[way.name].length - 1) / 2;
    showWay();
    slider.value = way.step;
  });
  slider.addEventListener("input", () => {
    way.step = Number(slider.value);
    showWay();
  });
  showWay();
}

// Light or dark: the system's choice until the button is pressed.
const theme = byId("theme"), root = document.documentElement;
const isDark = () => root.dataset.theme
  ? root.dataset.theme === "dark"
  : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
});
label();
