// Points on a canvas, with axes, zoom, a tip and a box that selects. Of the markup of the macro `plot` (parts.html).
"use strict";

const COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00", "#7D6BB0"];
const GREY = "#8a9097";

// What values stand for a place on an axis; below `least` of the largest in view, round numbers lie too close together.
const LOG = { to: Math.log10, from: (place) => 10 ** Math.min(Math.max(place, -300), 300), least: 0 };
const ROOT = { to: Math.sqrt, from: (place) => Math.min(Math.max(place, 0), 1e9) ** 2, least: 0.01 };
const PLAIN = { to: (value) => value, from: (place) => place, isPlain: true };

// Round numbers between two places, as [place, text]: powers of ten, or 1, 2, 5, ..., or even steps, until there are four.
function ticksBetween(scale, low, high) {
  const [from, to] = [scale.from(low), scale.from(high)];
  const unit = 10 ** Math.floor(Math.log10((to - from) / 6));
  const step = [1, 2, 5, 10].map((digit) => digit * unit).find((size) => size >= (to - from) / 6);
  const even = Array.from({ length: 9 }, (_, n) => (Math.ceil(from / step) + n) * step);
  const named = (values) => values.map((value) => [scale.to(value), String(Number(value.toPrecision(6)))]).filter(([place]) => place >= low && place <= high);
  if (scale.isPlain) return named(even);
  const least = Math.max(from, to * scale.least);
  const start = Math.floor(Math.log10(least)), every = Math.ceil((Math.log10(to) - start) / 10);
  const tens = Array.from({ length: Math.floor(Math.log10(to)) - start + 1 }, (_, n) => 10 ** (start + n));
  const ways = [
    tens.filter((_, n) => n % every === 0),
    tens.flatMap((ten) => [ten, 2 * ten, 5 * ten]),
    even.slice(0, 8),
  ].map((values) => [...(from === 0 ? [0] : []), ...values.filter((value) => value >= least && value <= to)]);
  return named(ways.find((values) => values.length >= 4) ?? ways[2]);
}

// `x` and `y` are what is drawn, already on their scales. The caller sets `shown`, `colorOf` and `colors`, then draws.
class Scatter {
  constructor(canvas, { x, y, scales, titles, describe, open, choose = null, diagonal = false, line = NaN }) {
    Object.assign(this, { canvas, titles, describe, open, choose, diagonal, line }); // line: a place upwards, dashed
    this.scales = scales;
    this.plot = canvas.closest(".plot");
    this.pen = canvas.getContext("2d");
    this.colors = [GREY];
    this.cells = new Map(); // 16 pixels of the canvas -> points in them
    this.marked = -1; // a point with a ring
    this.boxed = null; // chosen places: [left, right, bottom, top]
    canvas.asSvg = () => this.asSvg();
    this.measure();
    this.set(x, y);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  set(x, y) {
    Object.assign(this, { x, y });
    this.shown = new Uint8Array(x.length).fill(1);
    this.colorOf = new Uint8Array(x.length);
    this.showAll();
  }

  listen() {
    const { canvas } = this, figure = canvas.closest("[data-file]");
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 0.8 : 1.25, this.place(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.dragged = { at: this.place(event), from: this.place(event), moved: false, boxes: this.choose && !event.shiftKey };
      if (this.dragged.boxes) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerleave", () => { if (!this.dragged?.boxes) this.dragged = null; this.tip(-1); });
    canvas.addEventListener("pointercancel", () => { this.dragged = null; this.draw(); });
    canvas.addEventListener("pointerup", (event) => {
      const was = this.dragged, at = this.place(event), found = this.nearest(at);
      this.dragged = null;
      if (was?.moved && was.boxes) this.select(this.between(was.from, at));
      else if (was && !was.moved && found >= 0) this.open(found);
      else if (was && !was.moved && this.boxed) this.select(null);
    });
    canvas.addEventListener("keydown", (event) => {
      const [width, height] = [this.right - this.left, this.top - this.bottom];
      const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
      if (moves[event.key]) this.shift(moves[event.key][0] * width, moves[event.key][1] * height);
      else if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 0.8 : 1.25);
      else if (event.key === "Enter" && this.choose) this.select([this.left, this.right, this.bottom, this.top]);
      else if (event.key === "Escape" && this.choose) this.select(null);
      else return;
      event.preventDefault();
    });
    const acts = { in: () => this.zoom(0.6), out: () => this.zoom(1 / 0.6), all: () => { this.showAll(); this.draw(); }, choose: () => this.select([this.left, this.right, this.bottom, this.top]) };
    for (const button of figure.querySelectorAll("[data-zoom]")) button.addEventListener("click", acts[button.dataset.zoom]);
  }

  // The box that is chosen, or null; tells the page, which filters by it.
  select(box) {
    this.boxed = box;
    this.draw();
    this.choose(box);
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
  fromX(px) { return this.left + ((px - this.box.left) / this.box.width) * (this.right - this.left); }
  fromY(py) { return this.top - ((py - this.box.top) / this.box.height) * (this.top - this.bottom); }

  // The places between two corners in pixels.
  between([ax, ay], [bx, by]) {
    return [this.fromX(Math.min(ax, bx)), this.fromX(Math.max(ax, bx)), this.fromY(Math.max(ay, by)), this.fromY(Math.min(ay, by))];
  }

  zoom(factor, at) {
    const box = this.box, [px, py] = at ?? [box.left + box.width / 2, box.top + box.height / 2];
    const [x, y] = [this.fromX(px), this.fromY(py)];
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
    if (drag && Math.hypot(at[0] - drag.from[0], at[1] - drag.from[1]) > 3) drag.moved = true;
    if (drag?.moved && drag.boxes) {
      drag.at = at;
      this.draw();
    } else if (drag?.moved) {
      this.shift(((drag.at[0] - at[0]) / this.box.width) * (this.right - this.left), ((at[1] - drag.at[1]) / this.box.height) * (this.top - this.bottom));
      drag.at = at;
    }
    this.tip(drag?.moved ? -1 : this.nearest(at), at);
  }

  tip(found, at) {
    const tip = this.plot.querySelector(".tip");
    tip.hidden = found < 0;
    this.canvas.style.cursor = found < 0 ? (this.choose ? "crosshair" : "default") : "pointer";
    if (found < 0) return;
    tip.replaceChildren(...this.describe(found));
    tip.style.left = `${Math.max(Math.min(at[0] + 14, this.canvas.clientWidth - tip.offsetWidth - 4), 4)}px`;
    tip.style.top = `${at[1] - tip.offsetHeight - 10 < 0 ? at[1] + 18 : at[1] - tip.offsetHeight - 10}px`;
  }

  // A ring around one point; -1: around none.
  mark(n) {
    if (n === this.marked) return;
    this.marked = n;
    this.draw();
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

  isInView(n) {
    return this.x[n] >= this.left && this.x[n] <= this.right && this.y[n] >= this.bottom && this.y[n] <= this.top;
  }

  size() { return this.x.length > 5000 ? 3 : 5; }

  paint() {
    this.measure();
    const { canvas, pen, box } = this, ratio = window.devicePixelRatio || 1;
    const style = getComputedStyle(canvas), ink = (name) => style.getPropertyValue(name);
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    this.drawAxes(ink);
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
    if (Number.isFinite(this.line)) {
      pen.strokeStyle = ink("--quiet");
      pen.setLineDash([4, 4]);
      pen.beginPath();
      pen.moveTo(box.left, this.toY(this.line));
      pen.lineTo(box.left + box.width, this.toY(this.line));
      pen.stroke();
      pen.setLineDash([]);
    }
    this.cells = new Map();
    const layers = this.colors.map(() => []), hidden = [];
    for (let n = 0; n < this.x.length; n++) {
      if (!this.isInView(n)) continue;
      if (!this.shown[n]) {
        if (this.choose) hidden.push(n);
        continue;
      }
      layers[this.colorOf[n]].push(n);
      const key = (this.toY(this.y[n]) >> 4) * 4096 + (this.toX(this.x[n]) >> 4);
      if (this.cells.has(key)) this.cells.get(key).push(n); else this.cells.set(key, [n]);
    }
    const size = this.size();
    pen.globalAlpha = 0.18; // where what is filtered out lies, for the eye
    pen.fillStyle = GREY;
    for (const n of hidden) pen.fillRect(this.toX(this.x[n]) - 1, this.toY(this.y[n]) - 1, 2, 2);
    pen.globalAlpha = 0.75;
    layers.forEach((points, color) => {
      pen.fillStyle = this.colors[color];
      for (const n of points) pen.fillRect(this.toX(this.x[n]) - size / 2, this.toY(this.y[n]) - size / 2, size, size);
    });
    pen.globalAlpha = 1;
    if (this.boxed) this.drawBox(this.boxed, ink("--accent"));
    if (this.dragged?.moved && this.dragged.boxes) this.drawBox(this.between(this.dragged.from, this.dragged.at), ink("--accent"));
    if (this.marked >= 0 && this.isInView(this.marked)) {
      pen.strokeStyle = ink("--ink");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(this.toX(this.x[this.marked]), this.toY(this.y[this.marked]), 7, 0, 7);
      pen.stroke();
    }
    pen.restore();
  }

  drawBox([left, right, bottom, top], color) {
    const { pen } = this, [x, y] = [this.toX(left), this.toY(top)];
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = 1;
    pen.strokeRect(x, y, this.toX(right) - x, this.toY(bottom) - y);
    pen.globalAlpha = 0.08;
    pen.fillRect(x, y, this.toX(right) - x, this.toY(bottom) - y);
    pen.globalAlpha = 1;
  }

  drawAxes(ink) {
    const { pen, box } = this;
    pen.strokeStyle = ink("--line");
    pen.fillStyle = ink("--quiet");
    pen.lineWidth = 1;
    pen.font = "12px system-ui, sans-serif";
    pen.strokeRect(box.left, box.top, box.width, box.height);
    pen.textAlign = "center";
    for (const [at, text] of ticksBetween(this.scales[0], this.left, this.right)) pen.fillText(text, this.toX(at), box.top + box.height + 16);
    pen.fillText(this.titles[0], box.left + box.width / 2, box.top + box.height + 36);
    pen.textAlign = "right";
    for (const [at, text] of ticksBetween(this.scales[1], this.bottom, this.top)) pen.fillText(text, box.left - 6, this.toY(at) + 4);
    pen.save();
    pen.translate(12, box.top + box.height / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(this.titles[1], 0, 0);
    pen.restore();
  }

  // What is in view as a drawing, for a talk: the same places, marks and words.
  asSvg() {
    const { box } = this, style = getComputedStyle(this.canvas), ink = (name) => style.getPropertyValue(name);
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight], size = this.size();
    const text = (x, y, words, more = {}) => svg("text", { x, y, fill: ink("--quiet"), "font-size": 12, "font-family": "sans-serif", "text-anchor": "middle", ...more }, words);
    const drawing = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height });
    drawing.append(svg("rect", { width, height, fill: ink("--card") }), svg("rect", { x: box.left, y: box.top, width: box.width, height: box.height, fill: "none", stroke: ink("--line") }));
    if (this.diagonal) {
      const ends = [Math.max(this.left, this.bottom), Math.min(this.right, this.top)];
      if (ends[0] < ends[1]) drawing.append(svg("line", { x1: this.toX(ends[0]), y1: this.toY(ends[0]), x2: this.toX(ends[1]), y2: this.toY(ends[1]), stroke: ink("--line") }));
    }
    if (this.line >= this.bottom && this.line <= this.top) drawing.append(svg("line", { x1: box.left, y1: this.toY(this.line), x2: box.left + box.width, y2: this.toY(this.line), stroke: ink("--quiet"), "stroke-dasharray": "4 4" }));
    for (const [at, words] of ticksBetween(this.scales[0], this.left, this.right)) drawing.append(text(this.toX(at), box.top + box.height + 16, words));
    for (const [at, words] of ticksBetween(this.scales[1], this.bottom, this.top)) drawing.append(text(box.left - 6, this.toY(at) + 4, words, { "text-anchor": "end" }));
    const middle = box.top + box.height / 2;
    drawing.append(text(box.left + box.width / 2, box.top + box.height + 36, this.titles[0]), text(12, middle, this.titles[1], { transform: `rotate(-90 12 ${middle})` }));
    this.colors.forEach((fill, color) => {
      const group = svg("g", { fill, "fill-opacity": 0.75 });
      for (let n = 0; n < this.x.length; n++) {
        if (!this.shown[n] || this.colorOf[n] !== color || !this.isInView(n)) continue;
        group.append(svg("rect", { x: (this.toX(this.x[n]) - size / 2).toFixed(1), y: (this.toY(this.y[n]) - size / 2).toFixed(1), width: size, height: size }));
      }
      drawing.append(group);
    });
    return new XMLSerializer().serializeToString(drawing);
  }
}

// Names beside their colours, in the legend of a plot.
function showLegend(canvas, names, colors) {
  const list = canvas.closest("[data-file]").querySelector(".legend");
  list.replaceChildren(...names.map((name, n) => element("li", {}, svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { width: 10, height: 10, fill: colors[n] })), name)));
}
