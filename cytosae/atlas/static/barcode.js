// The picture of a barcode: bars upwards of a patient or disease, downwards of what it is compared with.
"use strict";

async function startBarcode() {
  const canvas = $("barcode");
  if (!canvas) return;
  const { dataset } = canvas, mine = CYTO.bytes(dataset.mine), others = CYTO.bytes(dataset.others);
  const latents = new Uint32Array(CYTO.bytes(dataset.latents).buffer), starts = dataset.starts.split(",").map(Number), names = dataset.families.split(",");
  const largest = Number(dataset.largest), k = Number(dataset.k), n = mine.length, pen = canvas.getContext("2d"), tip = canvas.parentElement.querySelector(".tip");
  const familyOf = new Uint8Array(n), said = $("barcode-said");
  for (let k = 0; k + 1 < starts.length; k++) familyOf.fill(k, starts[k], starts[k + 1]);
  let marked = -1, waiting = null, built = null;

  const value = (steps, column) => Math.expm1((steps[column] / 255) * Math.log1p(k * largest)) / k;
  const inks = () => {
    const style = getComputedStyle(canvas), ink = (name) => style.getPropertyValue(name).trim();
    return { ground: ink("--card"), quiet: ink("--quiet"), grey: ink("--edge"), ink: ink("--ink"), families: Array.from({ length: starts.length - 1 }, (_, k) => ink(`--f${k}`)) };
  };
  const size = () => [canvas.clientWidth, canvas.clientHeight];
  const middle = (height) => Math.round(height * 0.58);

  // Every bar as [column, left, top, width, height, colour]; the same for the canvas and for the drawing that is saved.
  function bars(width, height, colors) {
    const zero = middle(height), found = [], wide = width / n;
    for (let column = 0; column < n; column++) {
      const up = (mine[column] / 255) * (zero - 6), down = (others[column] / 255) * (height - zero - 4);
      if (down > 0) found.push([column, column * wide, zero + 1, wide, down, colors.grey]);
      if (up > 0) found.push([column, column * wide, zero - up, wide, up, colors.families[familyOf[column]]]);
    }
    return found;
  }

  function paint() {
    waiting = null;
    const [width, height] = size(), ratio = window.devicePixelRatio || 1, colors = inks(), zero = middle(height);
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (marked >= 0) {
      pen.fillStyle = colors.quiet;
      pen.globalAlpha = 0.3;
      pen.fillRect((marked * width) / n - 1, 0, width / n + 2, height);
      pen.globalAlpha = 1;
    }
    for (const [, left, top, wide, high, color] of bars(width, height, colors)) {
      pen.fillStyle = color;
      pen.fillRect(left, top, Math.max(wide * 0.92, 0.5), high);
    }
    for (let k = 0; k + 1 < starts.length; k++) {
      pen.fillStyle = colors.families[k];
      pen.fillRect((starts[k] * width) / n, zero - 0.5, ((starts[k + 1] - starts[k]) * width) / n - 1, 1.5);
    }
  }

  const draw = () => { waiting ??= requestAnimationFrame(paint); };

  function linesOf(column) {
    const has = mine[column] || others[column];
    if (!has) return [`family ${names[familyOf[column]]}`, "0 on both sides"];
    return [`latent ${latents[column]}, family ${names[familyOf[column]]}`, `here ${short(value(mine, column))}`, `others ${short(value(others, column))}`];
  }

  async function mark(column, at = null) {
    if (column !== marked) {
      marked = column;
      draw();
    }
    tip.hidden = column < 0;
    if (column < 0) return;
    built ??= readBuilt();
    const known = await built;
    if (column !== marked) return;
    const lines = linesOf(column), has = mine[column] || others[column];
    tip.replaceChildren(...tipOf(has ? known.picture(latents[column]) : null, lines));
    const left = at ?? ((column + 0.5) * canvas.clientWidth) / n;
    tip.style.left = `${Math.max(Math.min(left + 14, canvas.clientWidth - tip.offsetWidth - 4), 4)}px`;
    tip.style.top = "8px";
    said.textContent = `${lines.join(", ")}${has && !known.has(latents[column]) ? "; no page was built for it" : ""}`;
  }

  async function open() {
    if (marked < 0 || !(mine[marked] || others[marked])) return;
    const known = await (built ??= readBuilt());
    if (known.has(latents[marked])) location.href = up(`concepts/${latents[marked]}.html`);
  }

  const columnAt = (event) => {
    const box = canvas.getBoundingClientRect();
    return Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * n), 0), n - 1);
  };
  // Pointing is seldom exact: the largest bar within three pixels.
  const barAt = (event) => {
    const reach = Math.floor((3 * n) / canvas.clientWidth), at = columnAt(event);
    let best = at;
    for (let column = Math.max(at - reach, 0); column <= Math.min(at + reach, n - 1); column++) {
      if (Math.max(mine[column], others[column]) > Math.max(mine[best], others[best])) best = column;
    }
    return best;
  };
  canvas.addEventListener("pointermove", (event) => mark(barAt(event), event.offsetX));
  canvas.addEventListener("pointerleave", () => mark(-1));
  canvas.addEventListener("click", (event) => { mark(barAt(event), event.offsetX); open(); });
  canvas.addEventListener("blur", () => mark(-1));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key === "Enter") open();
    else if (event.key === "Home" || event.key === "End") mark(event.key === "Home" ? 0 : n - 1);
    else if (steps[event.key]) { // the next bar that is there
      let column = (marked < 0 && steps[event.key] < 0 ? n : marked) + steps[event.key];
      while (column >= 0 && column < n && !mine[column] && !others[column]) column += steps[event.key];
      if (column >= 0 && column < n) mark(column);
    } else return;
    event.preventDefault();
  });
  canvas.asSvg = () => {
    const [width, height] = size(), colors = inks();
    const drawing = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height }, svg("rect", { width, height, fill: colors.ground }));
    for (const [, x, y, wide, high, fill] of bars(width, height, colors)) drawing.append(svg("rect", { x: x.toFixed(2), y: y.toFixed(1), width: (wide * 0.92).toFixed(2), height: high.toFixed(1), fill }));
    return new XMLSerializer().serializeToString(drawing);
  };
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

document.addEventListener("DOMContentLoaded", startBarcode);
