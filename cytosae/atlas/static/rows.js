// A concept's cells on two sides, with maps, labels and numbers, as one picture for a talk: SVG, or PNG of it. What
// makes a row less sure on its page stands in its picture, too: the warning of the atlas, the row's doubts, and what the
// page marks with data-in-picture (whose cells, how many patients, which unit). The pictures come as scripts when a row
// is saved, since a page from the disk may not read back a picture file.
"use strict";

const ROW = { width: 1200, edge: 24, cell: 178, gap: 8, words: "sans-serif" };
const MOST_PIXELS = 448; // of a cell with its map

const textOf = (node) => node.textContent.replace(/\s+/g, " ").trim();

// A text that is at most so wide, else cut with an ellipsis.
function fitted(text, size, width, weight = 400) {
  const pen = fitted.pen ??= document.createElement("canvas").getContext("2d");
  pen.font = `${weight} ${size}px ${ROW.words}`;
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

// A picture as a data: address with its width and height; with the map of its frame if maps are shown. Null: none.
async function cellPicture(frame, withMap) {
  const source = frame.querySelector("img")?.getAttribute("src"), number = source?.match(/pictures\/(\d+)\.jpg$/)?.[1];
  if (!number) return null;
  const picture = new Image();
  picture.src = `data:image/jpeg;base64,${await CYTO.load(`picture-${number}`)}`;
  await picture.decode();
  const { naturalWidth: wide, naturalHeight: high } = picture, scale = MOST_PIXELS / Math.max(wide, high);
  if (!withMap) return { href: picture.src, wide, high };
  const canvas = element("canvas", { width: Math.round(wide * scale), height: Math.round(high * scale) });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const grey = pen.getImageData(0, 0, canvas.width, canvas.height), { data } = grey;
  for (let n = 0; n < data.length; n += 4) { // as the style sheet does under a map
    const light = 0.2126 * data[n] + 0.7152 * data[n + 1] + 0.0722 * data[n + 2];
    data.fill((1.06 * light - 127.5) * 0.94 + 127.5, n, n + 3);
  }
  pen.putImageData(grey, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(mapCanvas(CYTO.bytes(frame.dataset.map), Number(frame.dataset.share)), 0, 0, canvas.width, canvas.height);
  return { href: canvas.toDataURL("image/jpeg", 0.92), wide, high };
}

async function drawRow(row) {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const withMap = $("maps").getAttribute("aria-pressed") === "true", { width, edge, cell, gap } = ROW;
  const drawing = svg("svg", { xmlns: "http://www.w3.org/2000/svg", width });
  const words = (text, x, y, size, most, more = {}) => drawing.append(svg("text", { x, y, fill: color("--ink"), "font-family": ROW.words, "font-size": size, ...more }, fitted(text, size, most, more["font-weight"])));
  const quiet = { fill: color("--quiet") }, doubt = { fill: color("--warning") };
  const lines = (text, x, y, size, most, more = {}) => {
    const some = wrapped(text, size, most, more["font-weight"]), step = Math.round(1.4 * size);
    some.forEach((line, n) => words(line, x, y + n * step, size, most, more));
    return y + some.length * step; // the base line of what follows
  };
  const warning = document.querySelector("header .warning"); // of a whole atlas: in each of its pictures
  let y = edge + 22;
  if (warning) {
    const band = svg("rect", { width, fill: color("--warning-ground") });
    drawing.append(band);
    const below = lines(textOf(warning), edge, edge + 6, 15, width - 2 * edge, { ...doubt, "font-weight": 600 });
    band.setAttribute("height", below - 8);
    y = below + 24;
  }
  const title = textOf(row.querySelector("h3 :is(a, [title^='no page'])")), further = row.querySelector("h3 .of");
  words(`${title === row.dataset.latent ? `Latent ${title}` : title}${further ? ` (${textOf(further)})` : ""}`, edge, y, 24, width - 2 * edge, { "font-weight": 600 });
  const facts = [...row.querySelectorAll(".few dt")].map((name) => `${textOf(name)} ${textOf(name.nextElementSibling)}`);
  const said = [...row.querySelectorAll(".said > p:not(.hint, .tools)")].map(textOf).concat(facts);
  y = lines(said.join(" · "), edge, y + 30, 17, width - 2 * edge, quiet);
  for (const each of row.querySelectorAll(".said > p.doubt")) y = lines(textOf(each), edge, y, 17, width - 2 * edge, doubt);
  const top = y + 32, half = 3 * cell + 2 * gap, pictures = [...row.querySelectorAll(".side")].map((side) => [...side.querySelectorAll(".cell")]);
  const drawn = await Promise.all(pictures.map((cells) => Promise.all(cells.map((each) => cellPicture(each.querySelector(".frame"), withMap)))));
  [...row.querySelectorAll(".side")].forEach((side, n) => {
    const left = n === 0 ? edge : width - edge - half, name = side.matches(".of-a") ? "--a" : side.matches(".of-b") ? "--b" : "--line";
    words(textOf(side.querySelector(".whose")), left, top - 20, 17, half, { "font-weight": 600, fill: name === "--line" ? color("--ink") : color(`${name}-ink`) });
    drawing.append(svg("rect", { x: left, y: top - 11, width: half, height: 3, fill: color(name) }));
    if (!pictures[n].length) words(textOf(side.querySelector(".hint")), left, top + 24, 15, half, quiet);
    pictures[n].forEach((figure, at) => {
      const x = left + at * (cell + gap), found = drawn[n][at];
      drawing.append(svg("rect", { x, y: top, width: cell, height: cell, fill: color("--sunk") }));
      if (found) {
        const scale = cell / Math.max(found.wide, found.high), [wide, high] = [found.wide * scale, found.high * scale];
        drawing.append(svg("image", { x: x + (cell - wide) / 2, y: top + (cell - high) / 2, width: wide, height: high, href: found.href, preserveAspectRatio: "none" }));
      } else words("cannot be shown", x + 8, top + cell / 2, 13, cell - 16, quiet);
      [...figure.querySelectorAll("figcaption span")].forEach((line, down) => words(textOf(line), x, top + cell + 19 + 18 * down, 14, cell, down ? quiet : {}));
    });
  });
  let height = top + cell + 50 + edge;
  if (withMap) {
    const ramp = element("canvas");
    paint(ramp, Array.from({ length: 256 }, (_, n) => n / 255), 256, 1);
    drawing.append(svg("rect", { x: edge, y: height - 20, width: 160, height: 12, fill: "#8f8f8f" }), svg("image", { x: edge, y: height - 20, width: 160, height: 12, href: ramp.toDataURL(), preserveAspectRatio: "none" }));
    words("map: from 0 to the largest value of the concept in these cells", edge + 172, height - 9, 14, width - 2 * edge - 172, quiet);
    height += edge;
  }
  const about = [...document.querySelectorAll("[data-in-picture]")].map(textOf).filter(Boolean).join(" "); // whose cells, in which unit
  if (about) height = lines(about, edge, height + 4, 14, width - 2 * edge, quiet) + 4;
  drawing.setAttribute("height", height);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.prepend(svg("rect", { width, height, fill: color("--card") }));
  return new XMLSerializer().serializeToString(drawing);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-row]");
  if (!button) return;
  const row = button.closest(".sides"), kind = button.dataset.row, text = await drawRow(row);
  keep(kind === "svg" ? new Blob([text], { type: "image/svg+xml" }) : await pngOf(text), `cells-of-latent-${row.dataset.latent}.${kind}`);
});
