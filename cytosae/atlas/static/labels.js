// Long names: they break at spaces, and after / - _ and ::, never inside a word; what still does not fit ends in … and
// is told in full under the pointer.
"use strict";

const NAMED = "h1, h2, h3, dd, th[scope=row], .cell figcaption span:not(.number), .people a span, .people .hint, .portrait span, .alike .hint";
const CUT = ".cell figcaption span, .people a span, .people .hint, .portrait span, .alike .hint, .card h2 a, .card h3 a, .card p, .card p span";

// A place to break after each / - _ and :: of the texts in an element.
function letBreak(root) {
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), texts = [];
  while (walk.nextNode()) texts.push(walk.currentNode);
  for (const text of texts) {
    if (/^[\s\d.,e+-]*$/.test(text.data)) continue; // a number
    const parts = text.data.split(/(?<=[^\s/_-][/_-]|::)(?=\S)/);
    if (parts.length > 1) text.replaceWith(...parts.flatMap((part, n) => (n ? [document.createElement("wbr"), part] : [part])));
  }
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(NAMED).forEach(letBreak));
const told = new WeakMap(); // element -> the title that it got here; a card may show another concept by now
document.addEventListener("pointerover", (event) => {
  const cut = event.target.closest?.(CUT);
  if (!cut || (cut.title && cut.title !== told.get(cut))) return;
  if (cut.scrollWidth > cut.clientWidth) cut.title = cut.textContent.trim();
  else cut.removeAttribute("title");
  told.set(cut, cut.title);
});
