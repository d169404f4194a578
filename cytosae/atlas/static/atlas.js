// The script of all pages. Data comes in files that call CYTO.add(name, value); nothing is fetched.
"use strict";

const CYTO = (() => {
  const arrived = new Map(); // name -> value
  const waiting = new Map(); // name -> [promise, its resolve]

  function add(name, value) {
    arrived.set(name, value);
    waiting.get(name)?.[1](value);
  }

  // The data of that name; its script is added to the page if it is not there yet.
  function load(name) {
    if (arrived.has(name)) return Promise.resolve(arrived.get(name));
    if (!waiting.has(name)) {
      let resolve;
      const promise = new Promise((done) => { resolve = done; });
      waiting.set(name, [promise, resolve]);
      const script = document.createElement("script");
      script.src = `${document.body.dataset.up}data/${name}.js`;
      document.head.append(script);
    }
    return waiting.get(name)[0];
  }

  const KINDS = { f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array, i4: Int32Array };

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  }

  // A packed column as a typed array; half precision becomes float32.
  function unpack(column) {
    const raw = bytes(column.b64).buffer;
    if (column.dtype !== "f2") return new KINDS[column.dtype](raw);
    return Float32Array.from(new Uint16Array(raw), (half) => {
      const exponent = (half >> 10) & 31, fraction = half & 1023;
      return exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24; // never negative
    });
  }

  return { add, load, unpack, bytes };
})();

const $ = (id) => document.getElementById(id);
const up = (path) => document.body.dataset.up + path;
const COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00", "#000000"];
const GREY = "#8a9097";
const INFERNO = [[87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const short = (value) => (Number.isNaN(value) ? "–" : String(Number(value.toPrecision(3))));

function conceptLink(latent, hasPage) {
  if (hasPage) return element("a", { href: up(`concepts/${latent}.html`) }, String(latent));
  return element("span", { title: "no page was built for this latent" }, String(latent));
}

// ---------------------------------------------------------------------------------- maps over images

// Red, green, blue and opacity of a share between 0 and 1: what is not active shows the cell.
function heat(share) {
  const at = Math.min(share, 1) * (INFERNO.length - 1), below = Math.min(Math.floor(at), INFERNO.length - 2);
  const mixed = INFERNO[below].map((low, n) => low + (INFERNO[below + 1][n] - low) * (at - below));
  return [...mixed, 255 * 0.85 * share];
}

function paint(canvas, shares, width, height) {
  canvas.width = width;
  canvas.height = height;
  const picture = new ImageData(width, height);
  shares.forEach((share, n) => picture.data.set(heat(share), 4 * n));
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function paintRamps() {
  for (const ramp of document.querySelectorAll(".ramp")) paint(ramp, Array.from({ length: 256 }, (_, n) => n / 255), 256, 1);
}

function startMaps() {
  const button = $("maps");
  if (!button) return;
  const frames = [...document.querySelectorAll(".frame[data-map]")];
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    document.querySelector(".key").hidden = !shown;
    document.querySelector("main").classList.toggle("mapped", shown);
    for (const frame of frames) {
      frame.querySelector("canvas")?.remove();
      if (!shown) continue;
      const canvas = element("canvas", { "aria-hidden": "true" });
      const steps = CYTO.bytes(frame.dataset.map), side = Math.round(Math.sqrt(steps.length));
      paint(canvas, Array.from(steps, (step) => (step / 255) * Number(frame.dataset.share)), side, side);
      frame.append(canvas);
    }
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, select, textarea");
    if (event.key === "m" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) button.click();
  });
}

function startBarcodes() {
  for (const canvas of document.querySelectorAll(".stripes")) {
    const steps = CYTO.bytes(canvas.dataset.stripes), picture = new ImageData(steps.length, 1);
    steps.forEach((step, n) => picture.data.set([20, 34, 48, step], 4 * n));
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }
}

// ---------------------------------------------------------------------------------- one image

async function startImage() {
  const frame = $("tokens");
  if (!frame) return;
  const side = Number(frame.dataset.side), data = await CYTO.load(`image-${frame.dataset.image}`);
  const columns = Object.fromEntries(Object.entries(data).filter(([, value]) => value.dtype).map(([name, value]) => [name, CYTO.unpack(value)]));
  const { latents, patches, values } = columns, hasPage = new Set(columns.has_page);
  const starts = new Uint32Array(latents.length + 1); // where the patches of each latent begin
  columns.counts.forEach((count, n) => { starts[n + 1] = starts[n] + count; });
  const canvas = $("patches");
  const grid = 16; // pixels of a patch on the canvas
  let chosen = -1, mapped = -1;

  const entries = (n) => Array.from({ length: starts[n + 1] - starts[n] }, (_, k) => starts[n] + k);

  function draw() {
    const shares = new Float32Array(side * side);
    const largest = mapped < 0 ? 0 : Math.max(...entries(mapped).map((at) => values[at]));
    if (mapped >= 0) for (const at of entries(mapped)) shares[patches[at]] = values[at] / largest;
    canvas.width = canvas.height = side * grid;
    const pen = canvas.getContext("2d");
    shares.forEach((share, patch) => {
      const [red, green, blue, opacity] = heat(share);
      pen.fillStyle = `rgba(${red},${green},${blue},${opacity / 255})`;
      pen.fillRect((patch % side) * grid, Math.floor(patch / side) * grid, grid, grid);
    });
    if (chosen >= 0) {
      for (const [color, width] of [["#fff", 4], ["#000", 1.5]]) {
        pen.strokeStyle = color;
        pen.lineWidth = width;
        pen.strokeRect((chosen % side) * grid + 1, Math.floor(chosen / side) * grid + 1, grid - 2, grid - 2);
      }
    }
    frame.classList.toggle("mapped", mapped >= 0);
    document.querySelector(".key").hidden = mapped < 0;
    $("largest").textContent = mapped < 0 ? "" : `${short(largest * data.largest)} (latent ${latents[mapped]})`;
    for (const button of document.querySelectorAll("#list button")) button.setAttribute("aria-pressed", String(Number(button.dataset.at) === mapped));
  }

  // Rows of the table: [latent, value, its place among those with a map, or -1].
  function list(title, measure, rows) {
    rows.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    $("what").textContent = `${title}: ${rows.length} latents`;
    $("measure").textContent = measure;
    $("list").tBodies[0].replaceChildren(...rows.slice(0, 200).map(([latent, value, at]) => {
      const button = element("button", { type: "button", "data-at": at, "aria-pressed": "false", "aria-label": `Map of latent ${latent}` }, "map");
      button.addEventListener("click", () => { mapped = mapped === at ? -1 : at; draw(); });
      return element("tr", {}, element("th", { scope: "row" }, conceptLink(latent, hasPage.has(latent))), element("td", {}, short(value * data.largest)), element("td", {}, at < 0 ? "no patch" : button));
    }));
    draw();
  }

  function listImage() {
    chosen = -1;
    list("Whole image", "Sum over patches", Array.from(latents, (latent, n) => [latent, entries(n).reduce((sum, at) => sum + values[at], 0), n]));
  }

  function listPatch(patch) {
    chosen = patch;
    const rows = [];
    latents.forEach((latent, n) => {
      for (const at of entries(n)) if (patches[at] === patch) rows.push([latent, values[at], n]);
    });
    list(`Patch ${patch}, row ${Math.floor(patch / side)}, column ${patch % side}`, "Activation", rows);
  }

  $("whole").addEventListener("click", listImage);
  $("nomap").addEventListener("click", () => { mapped = -1; draw(); });
  // Tokens without a place in the image; not every backbone has them.
  for (const [id, title, measure, kind] of [["cls", "CLS token", "Activation", "cls"], ["registers", "Registers", "Sum over registers", "register"]]) {
    $(id)?.addEventListener("click", () => {
      chosen = -1;
      list(title, measure, Array.from(columns[`${kind}_latents`], (latent, n) => [latent, columns[`${kind}_values`][n], latents.indexOf(latent)]));
    });
  }
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const [column, row] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) => Math.min(Math.floor(share * side), side - 1));
    listPatch(row * side + column);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (chosen < 0) return listPatch(Math.floor(side / 2) * side + Math.floor(side / 2));
    const row = Math.min(Math.max(Math.floor(chosen / side) + step[0], 0), side - 1);
    const column = Math.min(Math.max((chosen % side) + step[1], 0), side - 1);
    listPatch(row * side + column);
  });
  listImage();
}

// ---------------------------------------------------------------------------------- scatter

// What values stand for a place on an axis; below `least` of the largest in view, round numbers lie too close together.
const LOG = { to: Math.log10, from: (place) => 10 ** Math.min(Math.max(place, -300), 300), least: 0 };
const ROOT = { to: Math.sqrt, from: (place) => Math.min(Math.max(place, 0), 1e9) ** 2, least: 0.01 };

// Round numbers between two places, as [place, text]: powers of ten, or 1, 2, 5, ..., or even steps, until there are four.
function ticksBetween(scale, low, high) {
  const [from, to] = [scale.from(low), scale.from(high)], least = Math.max(from, to * scale.least);
  const start = Math.floor(Math.log10(least)), every = Math.ceil((Math.log10(to) - start) / 10);
  const tens = Array.from({ length: Math.floor(Math.log10(to)) - start + 1 }, (_, n) => 10 ** (start + n));
  const unit = 10 ** Math.floor(Math.log10((to - from) / 6));
  const step = [1, 2, 5, 10].map((digit) => digit * unit).find((size) => size >= (to - from) / 6);
  const ways = [
    tens.filter((_, n) => n % every === 0),
    tens.flatMap((ten) => [ten, 2 * ten, 5 * ten]),
    Array.from({ length: 8 }, (_, n) => (Math.ceil(from / step) + n) * step),
  ].map((values) => [...(from === 0 ? [0] : []), ...values.filter((value) => value >= least && value <= to)]);
  const ticks = (ways.find((values) => values.length >= 4) ?? ways[2]).map((value) => [scale.to(value), String(Number(value.toPrecision(6)))]);
  return ticks.filter(([place]) => place >= low && place <= high);
}

// Points on a canvas. `x` and `y` are what is drawn, already on their scales.
class Scatter {
  constructor(canvas, { x, y, scale, titles, describe, open, diagonal = false }) {
    Object.assign(this, { canvas, x, y, scale, titles, describe, open, diagonal });
    this.pen = canvas.getContext("2d");
    this.shown = new Uint8Array(x.length).fill(1);
    this.colors = [GREY];
    this.colorOf = new Uint8Array(x.length);
    this.cells = new Map(); // 16 pixels of the canvas -> points in them
    this.measure();
    this.showAll();
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.place(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { this.dragged = { at: this.place(event), moved: false }; });
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerleave", () => { this.dragged = null; this.tip(-1); });
    canvas.addEventListener("pointerup", (event) => {
      const was = this.dragged;
      this.dragged = null;
      const found = this.nearest(this.place(event));
      if (was && !was.moved && found >= 0) this.open(found);
    });
    canvas.addEventListener("keydown", (event) => {
      const [width, height] = [this.right - this.left, this.top - this.bottom];
      const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
      if (moves[event.key]) this.shift(moves[event.key][0] * width, moves[event.key][1] * height);
      else if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 0.8 : 1.25);
      else return;
      event.preventDefault();
    });
    $("zoom-in").addEventListener("click", () => this.zoom(0.6));
    $("zoom-out").addEventListener("click", () => this.zoom(1 / 0.6));
    $("zoom-reset").addEventListener("click", () => { this.showAll(); this.draw(); });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  showAll() {
    let [left, right, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let n = 0; n < this.x.length; n++) {
      if (!Number.isFinite(this.x[n]) || !Number.isFinite(this.y[n])) continue;
      left = Math.min(left, this.x[n]); right = Math.max(right, this.x[n]);
      bottom = Math.min(bottom, this.y[n]); top = Math.max(top, this.y[n]);
    }
    if (left > right) [left, right, bottom, top] = [0, 1, 0, 1];
    const [across, down] = [0.04 * (right - left || 1), 0.04 * (top - bottom || 1)];
    Object.assign(this, { left: left - across, right: right + across, bottom: bottom - down, top: top + down });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  toX(value) { return this.box.left + ((value - this.left) / (this.right - this.left)) * this.box.width; }
  toY(value) { return this.box.top + ((this.top - value) / (this.top - this.bottom)) * this.box.height; }

  zoom(factor, at) {
    const box = this.box, [px, py] = at ?? [box.left + box.width / 2, box.top + box.height / 2];
    const x = this.left + ((px - box.left) / box.width) * (this.right - this.left);
    const y = this.top - ((py - box.top) / box.height) * (this.top - this.bottom);
    this.left = x + (this.left - x) * factor; this.right = x + (this.right - x) * factor;
    this.bottom = y + (this.bottom - y) * factor; this.top = y + (this.top - y) * factor;
    this.draw();
  }

  shift(x, y) {
    this.left += x; this.right += x; this.bottom += y; this.top += y;
    this.draw();
  }

  move(event) {
    const at = this.place(event), drag = this.dragged;
    if (drag && Math.hypot(at[0] - drag.at[0], at[1] - drag.at[1]) > 3) {
      drag.moved = true;
      this.shift(((drag.at[0] - at[0]) / this.box.width) * (this.right - this.left), ((at[1] - drag.at[1]) / this.box.height) * (this.top - this.bottom));
      drag.at = at;
    }
    this.tip(drag?.moved ? -1 : this.nearest(at), at);
  }

  tip(found, at) {
    const tip = $("tip");
    tip.hidden = found < 0;
    this.canvas.style.cursor = found < 0 ? "default" : "pointer";
    if (found < 0) return;
    tip.replaceChildren(...this.describe(found));
    tip.style.left = `${Math.min(at[0] + 14, this.canvas.clientWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${Math.max(at[1] - tip.offsetHeight - 10, 0)}px`;
  }

  // The drawn point within 8 pixels that is nearest, or -1: points lie in cells of 16 pixels.
  nearest([px, py]) {
    let found = -1, best = 64;
    const [column, row] = [px >> 4, py >> 4];
    for (let r = row - 1; r <= row + 1; r++) {
      for (let c = column - 1; c <= column + 1; c++) {
        for (const n of this.cells.get(r * 4096 + c) ?? []) {
          const distance = (this.toX(this.x[n]) - px) ** 2 + (this.toY(this.y[n]) - py) ** 2;
          if (distance < best) [found, best] = [n, distance];
        }
      }
    }
    return found;
  }

  // Once before the next picture of the screen, however often it is asked for.
  draw() {
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.paint(); });
  }

  measure() { // once for all points: asking for a width costs more than drawing one
    this.box = { left: 62, top: 8, width: this.canvas.clientWidth - 74, height: this.canvas.clientHeight - 52 };
  }

  paint() {
    this.measure();
    const { canvas, pen, box } = this, ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    this.drawAxes();
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top, box.width, box.height);
    pen.clip();
    if (this.diagonal) {
      pen.beginPath();
      pen.moveTo(this.toX(this.left), this.toY(this.left));
      pen.lineTo(this.toX(this.right), this.toY(this.right));
      pen.stroke();
    }
    pen.globalAlpha = 0.75;
    this.cells = new Map();
    const layers = this.colors.map(() => []);
    for (let n = 0; n < this.x.length; n++) {
      if (!this.shown[n] || !(this.x[n] >= this.left && this.x[n] <= this.right && this.y[n] >= this.bottom && this.y[n] <= this.top)) continue;
      layers[this.colorOf[n]].push(n);
      const key = (this.toY(this.y[n]) >> 4) * 4096 + (this.toX(this.x[n]) >> 4);
      if (this.cells.has(key)) this.cells.get(key).push(n); else this.cells.set(key, [n]);
    }
    const size = this.x.length > 5000 ? 3 : 5;
    layers.forEach((points, color) => {
      pen.fillStyle = this.colors[color];
      for (const n of points) pen.fillRect(this.toX(this.x[n]) - size / 2, this.toY(this.y[n]) - size / 2, size, size);
    });
    pen.restore();
  }

  drawAxes() {
    const { pen, box } = this;
    pen.strokeStyle = "#aab1b8";
    pen.fillStyle = "#3d444b";
    pen.font = "12px system-ui, sans-serif";
    pen.strokeRect(box.left, box.top, box.width, box.height);
    pen.textAlign = "center";
    for (const [at, text] of ticksBetween(this.scale, this.left, this.right)) pen.fillText(text, this.toX(at), box.top + box.height + 16);
    pen.fillText(this.titles[0], box.left + box.width / 2, box.top + box.height + 36);
    pen.textAlign = "right";
    for (const [at, text] of ticksBetween(this.scale, this.bottom, this.top)) pen.fillText(text, box.left - 6, this.toY(at) + 4);
    pen.save();
    pen.translate(12, box.top + box.height / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(this.titles[1], 0, 0);
    pen.restore();
  }
}

function showLegend(names, colors) {
  $("legend").replaceChildren(...names.map((name, n) => element("li", {}, svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, fill: colors[n] })), name)));
}

// ---------------------------------------------------------------------------------- filters and the table of latents

async function readBuilt() {
  const data = await CYTO.load("built"), [latents, thumbs, clusters] = [data.latents, data.thumbs, data.clusters].map(CYTO.unpack);
  const place = new Int32Array(data.n_latents).fill(-1);
  latents.forEach((latent, n) => { place[latent] = n; });
  return {
    has: (latent) => place[latent] >= 0,
    cluster: (latent) => (place[latent] < 0 || clusters[place[latent]] < 0 ? NaN : clusters[place[latent]]),
    thumb(latent) {
      const number = place[latent] < 0 ? -1 : thumbs[place[latent]];
      if (number < 0) return null;
      const size = 96, perSheet = 256, sheet = Math.floor(number / perSheet), at = number % perSheet;
      const rows = Math.ceil(Math.min(perSheet, data.n_thumbs - sheet * perSheet) / 16);
      const image = svg("image", { href: up(`sprites/${sheet}.jpg`), width: 16 * size, height: rows * size });
      return svg("svg", { viewBox: `${(at % 16) * size} ${Math.floor(at / 16) * size} ${size} ${size}`, "aria-hidden": "true" }, image);
    },
  };
}

async function readDataset(number) {
  const data = await CYTO.load(`latents-${number}`);
  const columns = { labels: data.labels };
  for (const name of ["frequency", "mean_activation", "max_activation", "label_entropy", "n_images", "top_label"]) columns[name] = CYTO.unpack(data[name]);
  return columns;
}

const PER_PAGE = 25;
const LABELS_WITH_COLOR = 7;

async function startLatents() {
  const form = $("filters");
  if (!form) return;
  const built = await readBuilt(), field = form.elements;
  const state = { data: null, q: null, rows: [], page: 0, key: "mean_activation", falling: true };
  const body = $("latents").tBodies[0];
  let scatter = null;

  const number = (name, otherwise) => (field[name].value === "" ? otherwise : Number(field[name].value));

  function chosen() {
    const { data, q } = state, words = field.search.value.trim().toLowerCase(), isNumber = /^\d+$/.test(words);
    const label = field.label.value === "" ? -1 : Number(field.label.value);
    const found = words && !isNumber ? new Set(data.labels.flatMap((name, n) => (name.toLowerCase().includes(words) ? [n] : []))) : null;
    const ranges = [["frequency", data.frequency], ["mean", data.mean_activation], ["entropy", data.label_entropy]]
      .map(([name, values]) => [values, number(`${name}_min`, -Infinity), number(`${name}_max`, Infinity)])
      .filter(([, low, high]) => low > -Infinity || high < Infinity);
    const qMax = q ? number("q_max", Infinity) : Infinity;
    const shown = new Uint8Array(data.frequency.length);
    for (let n = 0; n < shown.length; n++) {
      shown[n] = (label < 0 || data.top_label[n] === label)
        && (!isNumber || String(n).startsWith(words))
        && (!found || found.has(data.top_label[n]))
        && ranges.every(([values, low, high]) => values[n] >= low && values[n] <= high)
        && (qMax === Infinity || q[n] <= qMax)
        && (!field.built.checked || built.has(n)) ? 1 : 0;
    }
    return shown;
  }

  function key(name) {
    const { data, q } = state;
    if (name === "latent") return (n) => n;
    if (name === "cluster") return built.cluster;
    if (name === "q") return (n) => (q ? q[n] : NaN);
    if (name === "label") { // labels are in order already, and those without one come last
      return (n) => (data.top_label[n] < data.labels.length ? data.top_label[n] : NaN);
    }
    return (n) => data[name][n];
  }

  function sort() {
    const of = key(state.key), sign = state.falling ? -1 : 1;
    const values = new Float64Array(state.data.frequency.length);
    for (const n of state.rows) values[n] = of(n);
    state.rows.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b; // undefined last
      return sign * (x - y) || a - b;
    });
    for (const heading of $("latents").tHead.rows[0].cells) {
      if (heading.dataset.key === state.key) heading.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    }
  }

  function showPage() {
    const { data, q, rows } = state, last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
    state.page = Math.min(Math.max(state.page, 0), last);
    const some = rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    body.replaceChildren(...some.map((n) => element("tr", {},
      element("th", { scope: "row" }, conceptLink(n, built.has(n))),
      ...[short(data.frequency[n]), short(data.mean_activation[n]), short(data.max_activation[n]), data.n_images[n].toLocaleString("en"), short(data.label_entropy[n]), data.labels[data.top_label[n]] ?? "–", short(built.cluster(n)), q ? short(q[n]) : "–"].map((text) => element("td", {}, text)))));
    $("page").textContent = `Page ${state.page + 1} of ${last + 1}`;
    $("before").disabled = state.page === 0;
    $("after").disabled = state.page === last;
  }

  function color() {
    if (!scatter) return;
    const { data } = state, by = $("colour").value;
    if (by === "label") {
      const counts = new Map();
      data.top_label.forEach((label) => { if (label < data.labels.length) counts.set(label, (counts.get(label) ?? 0) + 1); });
      const common = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b).slice(0, LABELS_WITH_COLOR);
      scatter.colors = [GREY, ...common.map((_, n) => COLORS[n])];
      scatter.colorOf = Uint8Array.from(data.top_label, (label) => common.indexOf(label) + 1);
      showLegend([counts.size > common.length ? "other or none" : "none", ...common.map((label) => data.labels[label])], scatter.colors);
    } else if (by === "entropy") {
      const known = [...data.label_entropy].filter((value) => !Number.isNaN(value)), most = Math.max(...known, 1e-9);
      const steps = ["#fde725", "#5ec962", "#21918c", "#3b528b", "#440154"];
      scatter.colors = [GREY, ...steps];
      scatter.colorOf = Uint8Array.from(data.label_entropy, (value) => (Number.isNaN(value) ? 0 : 1 + Math.min(Math.floor((value / most) * steps.length), steps.length - 1)));
      showLegend(["none", ...steps.map((_, n) => `${short((n * most) / steps.length)} to ${short(((n + 1) * most) / steps.length)}`)], scatter.colors);
    } else {
      scatter.colors = [GREY, COLORS[5]];
      scatter.colorOf = Uint8Array.from(data.frequency, (_, n) => (built.has(n) ? 1 : 0));
      showLegend(["no page", "has a page"], scatter.colors);
    }
    scatter.draw();
  }

  function update() {
    const shown = chosen();
    state.rows = [];
    shown.forEach((is, n) => { if (is) state.rows.push(n); });
    state.page = 0;
    sort();
    showPage();
    let silent = 0;
    for (const n of state.rows) silent += state.data.frequency[n] === 0;
    const unseen = scatter && silent ? `; ${silent.toLocaleString("en")} of them are never active and not in the scatter` : "";
    $("count").textContent = `${state.rows.length.toLocaleString("en")} of ${shown.length.toLocaleString("en")} latents${unseen}`;
    if (scatter) {
      scatter.shown = shown;
      scatter.draw();
    }
  }

  function describe(n) {
    const { data, q } = state, lines = [`latent ${n}`, `frequency ${short(data.frequency[n])}`, `mean activation ${short(data.mean_activation[n])}`, data.labels[data.top_label[n]] ?? "no label"];
    if (q) lines.push(`q ${short(q[n])}`);
    if (!built.has(n)) lines.push("no page");
    const text = element("div", {}, ...lines.flatMap((line) => [line, element("br")])), thumb = built.thumb(n);
    return thumb ? [thumb, text] : [text];
  }

  async function changeDataset() {
    $("latents").ariaBusy = "true";
    const wanted = field.dataset.value, data = await readDataset(wanted);
    if (wanted !== field.dataset.value) return; // changed again meanwhile
    state.data = data;
    field.label.replaceChildren(element("option", { value: "" }, "any"), ...state.data.labels.map((name, n) => element("option", { value: n }, name)));
    if ($("scatter")) {
      const [x, y] = [state.data.frequency, state.data.mean_activation].map((values) => Float32Array.from(values, Math.log10));
      if (!scatter) {
        scatter = new Scatter($("scatter"), { x, y, scale: LOG, titles: ["frequency", "mean activation"], describe, open: (n) => { if (built.has(n)) location.href = up(`concepts/${n}.html`); } });
      } else {
        Object.assign(scatter, { x, y });
        scatter.showAll();
      }
      color();
    }
    update();
    $("latents").ariaBusy = "false";
  }

  async function changePair() {
    const pair = field.pair.value;
    const q = pair ? CYTO.unpack((await CYTO.load(`pair-${pair}`)).q) : null;
    if (pair !== field.pair.value) return;
    state.q = q;
    update();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target === field.dataset) changeDataset();
    else if (event.target === field.pair) changePair();
    else update();
  });
  form.addEventListener("reset", () => setTimeout(() => { state.q = null; changeDataset(); })); // its fields are not reset yet
  $("latents").tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    state.falling = heading.dataset.key === state.key ? !state.falling : ["frequency", "mean_activation", "max_activation", "n_images"].includes(heading.dataset.key);
    state.key = heading.dataset.key;
    state.page = 0;
    sort();
    showPage();
  });
  $("before").addEventListener("click", () => { state.page -= 1; showPage(); });
  $("after").addEventListener("click", () => { state.page += 1; showPage(); });
  $("colour")?.addEventListener("input", color);
  await changeDataset();
}

// ---------------------------------------------------------------------------------- a pair of diseases

async function startPair() {
  const canvas = $("pair");
  if (!canvas) return;
  const built = await readBuilt(), data = await CYTO.load(`pair-${canvas.dataset.pair}`);
  const columns = Object.fromEntries(Object.entries(data).map(([name, column]) => [name, CYTO.unpack(column)]));
  const scatter = new Scatter(canvas, {
    x: Float32Array.from(columns.mean_b, Math.sqrt),
    y: Float32Array.from(columns.mean_a, Math.sqrt),
    scale: ROOT,
    titles: [`mean in B, ${canvas.dataset.b}`, `mean in A, ${canvas.dataset.a}`],
    diagonal: true,
    describe(n) {
      const lines = [`latent ${n}`, `A ${short(columns.mean_a[n])}, B ${short(columns.mean_b[n])}`, `difference ${short(columns.difference[n])}`, `q ${short(columns.q[n])}`, ...(built.has(n) ? [] : ["no page"])];
      const thumb = built.thumb(n), text = element("div", {}, ...lines.flatMap((line) => [line, element("br")]));
      return thumb ? [thumb, text] : [text];
    },
    open: (n) => { if (built.has(n)) location.href = up(`concepts/${n}.html`); },
  });
  scatter.colors = [GREY, COLORS[0], COLORS[5]];
  scatter.colorOf = Uint8Array.from(columns.q, (q, n) => (q <= 0.05 ? (columns.difference[n] > 0 ? 1 : 2) : 0));
  showLegend(["q above 0.05, or not tested", "higher in A, q at most 0.05", "higher in B, q at most 0.05"], scatter.colors);
  scatter.draw();
}

document.addEventListener("DOMContentLoaded", () => {
  paintRamps();
  startMaps();
  startBarcodes();
  startImage();
  startLatents();
  startPair();
});
