// Figures as files for a talk: PNG of a canvas or a drawing, SVG of a drawing. All is made in the page. Every one begins
// and ends alike (class Sheet): the warning of the atlas, what it shows, and below it whose cells, which unit, which
// doubts (what the page marks with data-in-picture), and of which atlas it is.
"use strict";

const SHEET = { edge: 24, words: "sans-serif", least: 720 };
const textOf = (node) => node.textContent.replace(/\s+/g, " ").trim();
const inkOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A text that is at most so wide, else cut with an ellipsis.
function fitted(text, size, width, weight = 400) {
  const pen = fitted.pen ??= document.createElement("canvas").getContext("2d");
  pen.font = `${weight} ${size}px ${SHEET.words}`;
  if (pen.measureText(text).width <= width) return text;
  let cut = text.length;
  while (cut > 0 && pen.measureText(`${text.slice(0, cut)}…`).width > width) cut--;
  return `${text.slice(0, cut)}…`;
}

// A text as lines that are at most so wide; a word that is wider is cut.
function wrapped(text, size, width, weight = 400) {
  const lines = [];
  for (const word of text.split(" ").filter(Boolean)) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && fitted(longer, size, width, weight) === longer) lines[lines.length - 1] = longer;
    else lines.push(fitted(word, size, width, weight));
  }
  return lines;
}

class Sheet {
  constructor(width) {
    Object.assign(this, { width, inside: width - 2 * SHEET.edge, y: SHEET.edge, quiet: { fill: inkOf("--quiet") }, doubt: { fill: inkOf("--warning") } });
    this.drawing = svg("svg", { xmlns: "http://www.w3.org/2000/svg", width });
    const warning = document.querySelector("header .warning"); // of a whole atlas: in each of its pictures
    if (!warning) return;
    const band = svg("rect", { width, fill: inkOf("--warning-ground") });
    this.drawing.append(band);
    this.y += 6;
    this.lines(textOf(warning), 15, { ...this.doubt, "font-weight": 600 });
    band.setAttribute("height", this.y - 8);
    this.y += 4;
  }

  words(text, x, y, size, most, more = {}) {
    this.drawing.append(svg("text", { x, y, fill: inkOf("--ink"), "font-family": SHEET.words, "font-size": size, ...more }, fitted(text, size, most, more["font-weight"])));
  }

  // Words below what is there already, in lines of the whole width.
  lines(text, size, more = {}) {
    if (!text) return;
    const some = wrapped(text, size, this.inside, more["font-weight"]), step = Math.round(1.4 * size);
    some.forEach((line, n) => this.words(line, SHEET.edge, this.y + n * step, size, this.inside, more));
    this.y += some.length * step;
  }

  title(text) {
    this.y += 20;
    this.lines(text, 22, { "font-weight": 600 });
  }

  // The last words, and the drawing as a text.
  finish() {
    this.lines([...document.querySelectorAll("[data-in-picture]")].map(textOf).filter(Boolean).join(" "), 14, this.quiet);
    this.lines([...document.querySelectorAll("[data-atlas]")].map(textOf).join(" "), 14, this.quiet);
    const { width, y: height, drawing } = this;
    drawing.setAttribute("height", height);
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.prepend(svg("rect", { width, height, fill: inkOf("--card") }));
    return new XMLSerializer().serializeToString(drawing);
  }
}

const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font", "text-anchor", "dominant-baseline"];

// A drawing with what the style sheet says of it written into it, on the ground of the page.
function standalone(drawing) {
  const copy = drawing.cloneNode(true), box = drawing.viewBox.baseVal;
  const [from, to] = [drawing, copy].map((one) => [one, ...one.querySelectorAll("*")]);
  from.forEach((one, n) => {
    const style = getComputedStyle(one);
    for (const name of DRAWN) if (style.getPropertyValue(name)) to[n].style.setProperty(name, style.getPropertyValue(name));
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  copy.prepend(svg("rect", { x: box.x, y: box.y, width: box.width, height: box.height, fill: getComputedStyle(document.documentElement).getPropertyValue("--card") }));
  return new XMLSerializer().serializeToString(copy);
}

function keep(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function pngOf(text) {
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await picture.decode();
  const canvas = element("canvas", { width: 3 * picture.width, height: 3 * picture.height }); // sharp on a wall
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => { canvas.toBlob(done, "image/png"); });
}

// What a figure is as SVG: its drawing, or what its plot says of itself (plot.js puts `asSvg` on its canvas).
function svgOf(figure) {
  const canvas = figure.querySelector("canvas");
  if (canvas?.asSvg) return canvas.asSvg();
  return standalone(figure.querySelector("svg:not(.tip *, .legend *)"));
}

// What a figure is called: its own heading, or that of the part of the page in which it stands.
function headingOf(figure) {
  const own = figure.querySelector("h3") ?? figure.closest("details")?.querySelector("summary");
  if (own) return textOf(own);
  const before = [...document.querySelectorAll("main h2")].filter((one) => one.compareDocumentPosition(figure) & Node.DOCUMENT_POSITION_FOLLOWING);
  return before.length ? textOf(before.at(-1)) : "";
}

// A figure with what it needs to be understood alone: its legend and its caption, too.
function sheetOf(figure) {
  const inner = new DOMParser().parseFromString(svgOf(figure), "image/svg+xml").documentElement;
  const [wide, high] = ["width", "height"].map((name) => Number(inner.getAttribute(name)));
  const sheet = new Sheet(Math.max(wide + 2 * SHEET.edge, SHEET.least));
  sheet.title([textOf(document.querySelector("main h1")), headingOf(figure)].filter(Boolean).join(": "));
  inner.setAttribute("x", SHEET.edge);
  inner.setAttribute("y", sheet.y - 8);
  sheet.drawing.append(document.importNode(inner, true));
  sheet.y += high + 18;
  for (const item of figure.querySelectorAll(".legend li")) {
    const mark = item.querySelector("rect, .family"), fill = mark?.getAttribute("fill") ?? (mark ? getComputedStyle(mark).borderBottomColor : inkOf("--quiet"));
    sheet.drawing.append(svg("rect", { x: SHEET.edge, y: sheet.y - 11, width: 12, height: 12, fill }));
    sheet.words(textOf(item), SHEET.edge + 20, sheet.y, 14, sheet.inside - 20);
    sheet.y += 20;
  }
  for (const words of [figure.querySelector("figcaption"), document.querySelector(`[data-of-figure="${CSS.escape(figure.dataset.file)}"]`)]) {
    if (words) sheet.lines(textOf(words), 14, sheet.quiet);
  }
  return sheet.finish();
}

// The picture whose drawing is made by `draw` as a file; if the atlas lacks what is drawn, that is said beside the button.
async function saveFrom(button, kind, name, draw) {
  const told = button.parentElement.querySelector(".not-saved");
  try {
    const text = await draw();
    keep(kind === "svg" ? new Blob([text], { type: "image/svg+xml" }) : await pngOf(text), `${name}.${kind}`);
    told?.remove();
  } catch (error) {
    if (!(error instanceof CYTO.Missing)) throw error;
    const said = told ?? button.parentElement.appendChild(element("span", { class: "not-saved hint", role: "status" }));
    said.textContent = `Not saved: ${error.message} is missing from this atlas; build it again or copy it whole.`;
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-save]"), figure = button?.closest("[data-file]");
  if (button) saveFrom(button, button.dataset.save, figure.dataset.file, () => sheetOf(figure));
});
