// A concept's cells on two sides, with maps, labels and numbers, as one picture for a talk: SVG, or PNG of it. What
// makes a row less sure on its page stands in its picture, too: the warning of the atlas, the row's doubts, and what the
// page marks with data-in-picture (whose cells, how many patients, which unit). The pictures come as scripts when a row
// is saved, since a page from the disk may not read back a picture file.
"use strict";

const ROW = { width: 1200, cell: 178, gap: 8 };
const MOST_PIXELS = 448; // of a cell with its map

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
  const withMap = $("maps").getAttribute("aria-pressed") === "true", { width, cell, gap } = ROW, { edge } = SHEET;
  const sheet = new Sheet(width), { drawing, quiet, doubt } = sheet;
  const title = textOf(row.querySelector("h3 :is(a, [title^='no page'])")), further = row.querySelector("h3 .of");
  sheet.title(`${title === row.dataset.latent ? `Latent ${title}` : title}${further ? ` (${textOf(further)})` : ""}`);
  const facts = [...row.querySelectorAll(".few dt")].map((name) => `${textOf(name)} ${textOf(name.nextElementSibling)}`);
  const said = [...row.querySelectorAll(".said > p:not(.hint, .tools)")].map(textOf).concat(facts);
  sheet.lines(said.join(" · "), 17, quiet);
  for (const each of row.querySelectorAll(".said > p.doubt")) sheet.lines(textOf(each), 17, doubt);
  const top = sheet.y + 32, half = 3 * cell + 2 * gap, pictures = [...row.querySelectorAll(".side")].map((side) => [...side.querySelectorAll(".cell")]);
  const drawn = await Promise.all(pictures.map((cells) => Promise.all(cells.map((each) => cellPicture(each.querySelector(".frame"), withMap)))));
  [...row.querySelectorAll(".side")].forEach((side, n) => {
    const left = n === 0 ? edge : width - edge - half, name = side.matches(".of-a") ? "--a" : side.matches(".of-b") ? "--b" : "--line";
    sheet.words(textOf(side.querySelector(".whose")), left, top - 20, 17, half, { "font-weight": 600, fill: inkOf(name === "--line" ? "--ink" : `${name}-ink`) });
    drawing.append(svg("rect", { x: left, y: top - 11, width: half, height: 3, fill: inkOf(name) }));
    if (!pictures[n].length) sheet.words(textOf(side.querySelector(".hint")), left, top + 24, 15, half, quiet);
    pictures[n].forEach((figure, at) => {
      const x = left + at * (cell + gap), found = drawn[n][at];
      drawing.append(svg("rect", { x, y: top, width: cell, height: cell, fill: inkOf("--sunk") }));
      if (found) {
        const scale = cell / Math.max(found.wide, found.high), [wide, high] = [found.wide * scale, found.high * scale];
        drawing.append(svg("image", { x: x + (cell - wide) / 2, y: top + (cell - high) / 2, width: wide, height: high, href: found.href, preserveAspectRatio: "none" }));
      } else sheet.words("cannot be shown", x + 8, top + cell / 2, 13, cell - 16, quiet);
      [...figure.querySelectorAll("figcaption span")].forEach((line, down) => sheet.words(textOf(line), x, top + cell + 19 + 18 * down, 14, cell, down ? quiet : {}));
    });
  });
  sheet.y = top + cell + 50 + edge;
  if (withMap) {
    const ramp = element("canvas"), y = sheet.y - 20;
    paint(ramp, Array.from({ length: 256 }, (_, n) => n / 255), 256, 1);
    drawing.append(svg("rect", { x: edge, y, width: 160, height: 12, fill: "#8f8f8f" }), svg("image", { x: edge, y, width: 160, height: 12, href: ramp.toDataURL(), preserveAspectRatio: "none" }));
    sheet.words(`map: from 0 to the ${textOf(document.querySelector(".key [data-top]"))}`, edge + 172, y + 11, 14, sheet.inside - 172, quiet);
    sheet.y += edge;
  }
  return sheet.finish();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-row]"), row = button?.closest(".sides");
  if (button) saveFrom(button, button.dataset.row, `cells-of-latent-${row.dataset.latent}`, () => drawRow(row));
});
