"use strict";
// Draws what the page's JSON holds. Tables are there without it.
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.error = event.message; });

const data = JSON.parse(document.getElementById("data").textContent);
const NAMESPACE = "http://www.w3.org/2000/svg";
const NEAR = 3; // the best ones stand out among the curves

function element(name, attributes, parent, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function html(name, className, parent, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

// --- scales ----------------------------------------------------------------------------------

function linear(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function logarithmic(low, high, from, to) {
  const scale = linear(Math.log(low), Math.log(high), from, to);
  return (value) => scale(Math.log(value));
}

function roundTicks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough * 0.999) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) ticks.push(i * step);
  return ticks;
}

function decadeTicks(low, high) {
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    if (ticks.length <= 7) return ticks.length > 1 ? ticks : roundTicks(low, high, 4);
  }
  const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
  const stride = Math.ceil((last - first + 1) / 7); // so wide is what a diverged member leaves
  const count = Math.ceil((last - first + 1) / stride);
  return Array.from({ length: count }, (_, i) => 10 ** (first + i * stride));
}

function short(value) {
  const rounded = Number(value.toPrecision(3));
  return Math.abs(rounded) < 1e6 ? String(rounded) : rounded.toExponential().replace("+", "");
}

const quantile = (values, share) => [...values].sort((a, b) => a - b)[Math.floor(share * (values.length - 1))];

// Range of the scores with a little air; fractions stay within 0 and 1.
function scoreRange(values, percent) {
  let low = Math.min(...values), high = Math.max(...values);
  const air = (high - low || 0.1) * 0.06;
  low -= air; high += air;
  return percent ? [Math.max(0, low), Math.min(1, high)] : [low, high];
}

function scoreText(board, value, digits = 1) {
  return board.percent ? `${(100 * value).toFixed(digits)}\u00a0%` : value.toFixed(3);
}

function ySvgAxis(svg, ticks, y, left, right, text) {
  for (const tick of ticks) {
    element("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }, svg);
    element("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, text(tick));
  }
}

function percentTick(board, ticks) {
  const fine = ticks.length > 1 && ticks[1] - ticks[0] < 0.0099;
  return (tick) => board.percent ? `${(100 * tick).toFixed(fine ? 1 : 0)}\u00a0%` : short(tick);
}

// --- curves ----------------------------------------------------------------------------------

function settingsText(member) {
  const known = Object.entries(member.settings).filter(([, text]) => text !== "–");
  return known.map(([name, text]) => `${name.replaceAll("_", " ")} ${text}`).join(", ");
}

function drawCurves(board, state, figure) {
  figure.replaceChildren();
  const metric = state.metric, loss = metric !== "score";
  const drawn = board.members.filter((member) => member.curves[metric].some((v) => v !== null));
  if (!drawn.length) return html("p", "note", figure, "Nothing was measured.");
  const width = Math.max(280, figure.clientWidth || 960);
  const height = Math.round(Math.min(400, Math.max(230, width * 0.4)));
  const left = 46, right = width - 40, top = 8, bottom = height - 40;
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${metric.replace("_", " ")} over epochs of ${drawn.length} members`,
  }, figure);
  svg.style.setProperty("--faintness", Math.max(0.1, Math.min(0.55, 30 / drawn.length)));
  const valuesOf = (members) =>
    members.flatMap((member) => member.curves[metric].filter((v) => v !== null));
  const values = valuesOf(drawn);
  const epochs = Math.max(...drawn.map((member) => member.curves[metric].length));
  const log = loss && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 8;
  const scored = valuesOf(drawn.filter((member) => member.score !== null));
  const ranging = loss || !scored.length ? values : scored; // diverged scores may lie anywhere
  const floor = quantile(ranging, 0.1); // early epochs fall below the picture: the end matters
  const [low, high] = log
    ? [Math.min(...values) / 1.05, Math.max(...values) * 1.05]
    : scoreRange(loss ? values : ranging.filter((v) => v >= floor), board.percent && !loss);
  const x = linear(1, Math.max(2, epochs), left + 6, right);
  const y = (log ? logarithmic : linear)(low, high, bottom, top);
  const ticks = log ? decadeTicks(low, high) : roundTicks(low, high, 5);
  ySvgAxis(svg, ticks, y, left, right, loss ? short : percentTick(board, ticks));
  const steps = roundTicks(1, epochs, Math.min(10, width / 70)).filter(Number.isInteger);
  const apart = 0.6 * (steps[1] - steps[0] || 0);
  for (const tick of [1, ...steps.filter((step) => step > 1 + apart)])
    element("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, svg, tick);
  element("text", { x: right, y: bottom + 35, "text-anchor": "end" }, svg, "epoch");
  if (log) element("text", { x: left + 6, y: bottom + 35 }, svg, "logarithmic");

  const window = `window-${board.id}`;
  const clip = element("clipPath", { id: window }, element("defs", {}, svg));
  element("rect", { x: left, y: top - 6, width: width - left, height: bottom - top + 6 }, clip);
  const paths = new Map();
  for (const member of [...drawn].reverse()) {
    let pen = "M", d = "";
    member.curves[metric].forEach((value, i) => {
      if (value === null) { pen = "M"; return; }
      d += `${pen}${x(i + 1).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    const group = element("g", { "data-place": member.place, "clip-path": `url(#${window})` }, svg);
    const path = element("path", { class: "line", d }, group);
    const last = member.curves[metric].findLastIndex((v) => v !== null);
    let end = null;
    if (member.stopped || member.curves[metric].length === 1) {
      const [cx, cy] = [x(last + 1), y(member.curves[metric][last])];
      const cross = `M${cx - 3} ${cy - 3}l6 6m0 -6l-6 6`;
      end = element("path", { class: "end", d: cross }, group);
    }
    paths.set(member.place, { group, path, end, last, member });
  }
  const labels = element("g", {}, svg);
  const spot = element("circle", { class: "spot", r: 4, visibility: "hidden" }, svg);
  const tip = html("div", "tip", figure);

  state.mark = () => {
    const near = new Set(drawn.slice(0, NEAR).map((member) => member.place));
    for (const [place, { group, path, end }] of paths)
      for (const part of [path, end].filter(Boolean)) {
        part.classList.toggle("near", near.has(place));
        part.classList.toggle("selected", place === state.selected);
        part.classList.toggle("over", place === state.over && place !== state.selected);
      }
    for (const place of [...near, state.over, state.selected]) {
      const found = paths.get(place);
      if (found) labels.before(found.group);
    }
    labels.replaceChildren();
    const named = [...near, state.selected].filter((place) => {
      const found = paths.get(place);
      return found && found.member.curves[metric][found.last] >= low; // else below the picture
    });
    const places = [...new Set(named)].map((place) => {
      const { member, last } = paths.get(place);
      return { place, id: member.id, x: x(last + 1) + 7, y: y(member.curves[metric][last]) + 4 };
    }).sort((a, b) => a.y - b.y);
    places.forEach((label, i) => {
      if (i) label.y = Math.max(label.y, places[i - 1].y + 14);
    });
    const over = Math.max(0, (places.at(-1)?.y ?? 0) - bottom - 4);
    for (const label of places) {
      const name = label.place === state.selected ? "label selected" : "label";
      element("text", { class: name, x: label.x, y: label.y - over }, labels, label.id);
    }
  };
  state.mark();

  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const epoch = Math.round(linear(left + 6, right, 1, Math.max(2, epochs))(px));
    let best = null;
    for (const [place, { member }] of paths) {
      const at = Math.min(Math.max(epoch, 1), member.curves[metric].length);
      const value = member.curves[metric][at - 1];
      if (value === null || value === undefined || value < low) continue;
      const away = Math.hypot(y(value) - py, 0.3 * (x(at) - px));
      if (!best || away < best.away) best = { away, place, member, at, value };
    }
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    if (!found) return;
    hover(board, state, found.place);
    const [cx, cy] = [x(found.at), y(found.value)];
    for (const [name, value] of [["cx", cx], ["cy", cy], ["visibility", "visible"]])
      spot.setAttribute(name, value);
    tip.replaceChildren();
    html("b", "", tip, found.member.id);
    if (board.severalRuns) tip.append(` of ${found.member.run}`);
    const value = loss ? found.value.toPrecision(3) : scoreText(board, found.value);
    tip.append(` ${value} after epoch ${found.at}`);
    const told = settingsText(found.member);
    if (told) html("div", "", tip, told);
    if (found.member.stopped) html("div", "", tip, found.member.stopped);
    tip.classList.add("shown");
    tip.style.left = `${Math.min(Math.max(0, cx + 14), width - tip.offsetWidth)}px`;
    const above = cy - tip.offsetHeight - 14;
    tip.style.top = `${above > 0 ? above : cy + 18}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.classList.remove("shown");
    spot.setAttribute("visibility", "hidden");
    hover(board, state, null);
  });
  svg.addEventListener("click", (event) => {
    const found = nearest(event);
    if (found) select(board, state, found.place);
  });
  return svg;
}

// --- effects and scatter ---------------------------------------------------------------------

function drawEffects(board, state, place) {
  place.replaceChildren();
  const scores = board.effects.flatMap((effect) => effect.points.map((point) => point[1]));
  const [low, high] = scoreRange(scores, board.percent);
  const figures = board.effects.map((effect) => {
    const figure = html("figure", "", place);
    html("figcaption", "", figure, effect.name);
    return figure;
  });
  board.effects.forEach((effect, number) => {
    const figure = figures[number]; // all are there, so their widths are the final ones
    const width = Math.max(200, figure.clientWidth || 260), height = 190;
    const left = 46, right = width - 14, top = 8, bottom = height - 26;
    const label = `score by ${effect.name}`;
    const box = { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label };
    const svg = element("svg", box, figure);
    const y = linear(low, high, bottom, top);
    const ticks = roundTicks(low, high, 4);
    ySvgAxis(svg, ticks, y, left, right, percentTick(board, ticks));
    const count = effect.labels.length, edge = Math.min(24, (right - left) / (2 * count));
    const ends = effect.values ? [effect.values[0], effect.values.at(-1)] : [0, count - 1];
    const alone = !effect.means.length; // each value about once
    const scale = effect.log ? logarithmic : linear;
    const x = scale(...ends, left + (alone ? 8 : edge), right - (alone ? 8 : edge));
    const at = (i) => (count === 1 ? (left + right) / 2 : x(effect.values ? effect.values[i] : i));
    const named = alone
      ? (effect.log ? decadeTicks : roundTicks)(...ends, 4).map((tick) => [x(tick), short(tick)])
      : effect.labels.map((text, i) => [at(i), text]);
    let free = -Infinity;
    for (const [middle, text] of named) {
      const room = text.length * 3.4 + 4;
      if (middle - room < free) continue;
      free = middle + room;
      element("text", { x: middle, y: bottom + 18, "text-anchor": "middle" }, svg, text);
    }
    const line = effect.means.map((mean, i) => `${i ? "L" : "M"}${at(i)} ${y(mean)}`).join("");
    effect.points.forEach(([i, score, member], n) => {
      const room = alone ? 0 : Math.min(14, edge);
      const aside = (((n * 7) % 11) / 10 - 0.5) * room; // dots alike stay apart
      const where = { class: "dot", cx: at(i) + aside, cy: y(score), r: 3.2, "data-place": member };
      const dot = element("circle", where, svg);
      const known = board.members.find((one) => one.place === member);
      element("title", {}, dot, `${known.id} ${scoreText(board, score)}: ${settingsText(known)}`);
      dot.addEventListener("click", () => select(board, state, member));
    });
    if (effect.joined) element("path", { class: "mean", d: line }, svg);
    effect.means.forEach((mean, i) => {
      const dot = element("circle", { class: "mean-dot", cx: at(i), cy: y(mean), r: 4 }, svg);
      element("title", {}, dot, `mean at ${effect.labels[i]}: ${scoreText(board, mean)}`);
    });
    for (const dot of svg.querySelectorAll(".dot"))
      dot.classList.toggle("selected", dot.dataset.place === state.selected);
  });
}

function drawScatter(points, figure) {
  figure.replaceChildren();
  const size = Math.min(480, Math.max(260, figure.clientWidth || 420));
  const left = 52, right = size - 12, top = 22, bottom = size - 44;
  const svg = element("svg", {
    viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "predicted against true values",
  }, figure);
  const all = points.flat(), [low, high] = scoreRange(all, false);
  const x = linear(low, high, left, right), y = linear(low, high, bottom, top);
  ySvgAxis(svg, roundTicks(low, high, 5), y, left, right, short);
  for (const tick of roundTicks(low, high, 5))
    element("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, svg, short(tick));
  element("text", { x: right, y: bottom + 37, "text-anchor": "end" }, svg, "true");
  element("text", { x: left, y: 11 }, svg, "predicted");
  const ends = { x1: x(low), y1: y(low), x2: x(high), y2: y(high) };
  element("line", { class: "diagonal", ...ends }, svg);
  for (const [truth, predicted] of points)
    element("circle", { class: "dot", cx: x(truth), cy: y(predicted), r: 3 }, svg);
}

// --- choosing, sorting, copying --------------------------------------------------------------

function hover(board, state, place) {
  if (state.over === place) return;
  state.over = place;
  for (const row of state.rows) row.classList.toggle("over", row.dataset.place === place);
  state.mark?.();
}

function select(board, state, place) {
  state.selected = place;
  const member = board.members.find((one) => one.place === place);
  for (const row of state.rows) {
    row.classList.toggle("selected", row.dataset.place === place);
    row.setAttribute("aria-selected", row.dataset.place === place);
  }
  for (const dot of state.section.querySelectorAll(".dot"))
    dot.classList.toggle("selected", dot.dataset.place === place);
  state.section.querySelector(".chosen").textContent = member.id;
  const pre = state.section.querySelector(".command");
  pre.replaceChildren();
  member.command.forEach((part, i) => {
    if (i) pre.append(" ");
    html("span", "", pre, part); // a flag and its value stay on one line
  });
  state.mark?.();
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const order = before === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = [...body.rows].every((row) => value(row) === "" || !isNaN(value(row)));
    const compare = (a, b) => numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // what is missing stays last
      return order === "ascending" ? compare(a, b) : compare(b, a);
    });
    body.append(...rows);
  }));
}

async function copy(button, pre) {
  try {
    await navigator.clipboard.writeText(pre.textContent);
  } catch {
    getSelection().selectAllChildren(pre);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

const redraw = [];
for (const board of data.boards) {
  const section = document.querySelector(`[data-board="${board.id}"]`);
  const table = section.querySelector(".leaderboard");
  const rows = [...table.tBodies[0].rows];
  board.severalRuns = new Set(board.members.map((member) => member.run)).size > 1;
  const measured = (metric) => board.members.some((m) => m.curves[metric].some((v) => v !== null));
  const metric = ["score", "val_loss", "train_loss"].find(measured) ?? "score";
  const state = { section, rows, metric, selected: null, over: null };
  const curves = () => drawCurves(board, state, section.querySelector(".curves"));
  const effects = section.querySelector(".effects");
  redraw.push(curves);
  if (effects) redraw.push(() => drawEffects(board, state, effects));

  sortable(table);
  for (const row of rows) {
    row.addEventListener("click", () => select(board, state, row.dataset.place));
    row.addEventListener("pointerenter", () => hover(board, state, row.dataset.place));
    row.addEventListener("pointerleave", () => hover(board, state, null));
    row.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      select(board, state, row.dataset.place);
    });
  }
  const buttons = [...section.querySelectorAll("[data-metric]")];
  const press = (chosen) => {
    state.metric = chosen;
    for (const button of buttons)
      button.setAttribute("aria-pressed", button.dataset.metric === chosen);
  };
  for (const button of buttons) {
    button.disabled = !measured(button.dataset.metric);
    button.addEventListener("click", () => { press(button.dataset.metric); curves(); });
  }
  press(metric);
  const pre = section.querySelector(".command"), button = section.querySelector(".copy");
  button.addEventListener("click", () => copy(button, pre));
  select(board, state, board.members[0].place);
}
for (const figure of document.querySelectorAll(".scatter"))
  redraw.push(() => drawScatter(data.scatters[figure.dataset.place], figure));

let drawnAt = 0;
function draw() {
  if (drawnAt === document.body.clientWidth) return;
  drawnAt = document.body.clientWidth;
  for (const one of redraw) one();
}
draw();
addEventListener("resize", draw);
root.dataset.ready = "true";
