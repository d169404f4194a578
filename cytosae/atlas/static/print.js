// Printing: pictures that were not scrolled to yet are loaded first, and what is folded is opened.
"use strict";

function unfold() {
  for (const picture of document.images) picture.loading = "eager";
  for (const details of document.querySelectorAll("details")) details.open = true;
}

document.addEventListener("click", async (event) => {
  if (!event.target.closest("[data-print]")) return;
  unfold();
  await Promise.all([...document.images].map((picture) => picture.decode().catch(() => null)));
  window.print();
});
addEventListener("beforeprint", unfold);
