// Figures as files for a talk: PNG of a canvas or a drawing, SVG of a drawing. All is made in the page.
"use strict";

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

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-save]");
  if (!button) return;
  const figure = button.closest("[data-file]"), text = svgOf(figure), kind = button.dataset.save;
  keep(kind === "svg" ? new Blob([text], { type: "image/svg+xml" }) : await pngOf(text), `${figure.dataset.file}.${kind}`);
});
