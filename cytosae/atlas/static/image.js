// The page of an image: the latents of each patch, of CLS and of registers, and the map of each latent.
"use strict";

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
    document.querySelector(".key").hidden = $("nomap").hidden = mapped < 0;
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

document.addEventListener("DOMContentLoaded", startImage);
