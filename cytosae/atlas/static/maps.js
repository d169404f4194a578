// Maps over pictures: where in the cell a latent is active. Maps are bytes, one per patch; 255 is the map's own largest.
"use strict";

const INFERNO = [[87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // without its darkest quarter

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

// A canvas of as many pixels as there are patches; the style sheet stretches it over the picture.
function mapCanvas(steps, share) {
  const canvas = element("canvas", { "aria-hidden": "true" }), side = Math.round(Math.sqrt(steps.length));
  paint(canvas, Array.from(steps, (step) => (step / 255) * share), side, side);
  return canvas;
}

function paintRamps() {
  for (const ramp of document.querySelectorAll(".ramp")) paint(ramp, Array.from({ length: 256 }, (_, n) => n / 255), 256, 1);
}

// Puts the map of a frame over its picture, which is grey there; of a frame that has one, nothing.
function showMap(frame) {
  if (frame.querySelector(".map")) return;
  const layer = element("span", { class: "map", "aria-hidden": "true" }), picture = frame.querySelector("img");
  if (picture) layer.append(element("img", { src: picture.getAttribute("src"), alt: "", loading: "lazy" }));
  const canvas = mapCanvas(CYTO.bytes(frame.dataset.map), Number(frame.dataset.share));
  layer.append(canvas);
  frame.append(layer);
  if (picture) fitMap(canvas, picture);
}

// A picture that is no square lies in the middle of its frame, and its map over it.
function fitMap(canvas, picture) {
  if (!picture.naturalWidth) {
    picture.addEventListener("load", () => fitMap(canvas, picture), { once: true });
    return;
  }
  const wide = picture.naturalWidth / picture.naturalHeight, inset = (part) => `${50 - 50 * part}%`;
  canvas.style.inset = `${inset(Math.min(1, 1 / wide))} ${inset(Math.min(1, wide))}`;
  canvas.style.width = `${100 * Math.min(1, wide)}%`;
  canvas.style.height = `${100 * Math.min(1, 1 / wide)}%`;
}

// The button #maps (and key m) shows or hides the maps of all frames; it begins as it is pressed in the page.
function startMaps() {
  const button = $("maps");
  if (!button) return;
  const change = (shown) => {
    button.setAttribute("aria-pressed", String(shown));
    for (const key of document.querySelectorAll(".key")) key.hidden = !shown;
    document.querySelector("main").classList.toggle("mapped", shown);
    for (const frame of document.querySelectorAll(".frame[data-map]")) {
      if (shown) showMap(frame);
      else frame.querySelector(".map")?.remove();
    }
    document.dispatchEvent(new CustomEvent("maps", { detail: shown }));
  };
  button.addEventListener("click", () => change(button.getAttribute("aria-pressed") !== "true"));
  document.addEventListener("keydown", (event) => {
    if (event.key === "m" && !isTyping(event)) button.click();
  });
  if (button.getAttribute("aria-pressed") === "true") change(true);
}

// The slider below a large picture: left of it the picture, right of it the map.
function startWipes() {
  document.addEventListener("input", (event) => {
    if (!event.target.matches(".wipe")) return;
    const frame = event.target.closest(".cell").querySelector(".frame");
    showMap(frame);
    frame.style.setProperty("--wipe", `${event.target.value}%`);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  paintRamps();
  startMaps();
  startWipes();
});
