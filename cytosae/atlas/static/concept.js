// The page of a concept: a point of the patients' strip shows who it is, the value and the patient's own best cell.
"use strict";

function startStrips() {
  const strips = document.querySelector(".strips");
  if (!strips) return;
  const tip = strips.querySelector(".tip");
  const hide = () => { tip.hidden = true; };

  function show(point) {
    const text = point.querySelector("title").textContent, cell = point.dataset.cell;
    tip.replaceChildren(
      ...(cell === undefined ? [] : [element("img", { class: "best-cell", src: up(`pictures/${cell}.jpg`), alt: "" })]),
      element("div", {}, text),
    );
    tip.hidden = false;
    const box = strips.getBoundingClientRect(), at = point.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(at.left - box.left + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${at.top - box.top - tip.offsetHeight - 8}px`;
  }

  strips.addEventListener("pointerover", (event) => {
    if (event.target.matches("circle")) show(event.target);
  });
  strips.addEventListener("pointerout", (event) => {
    if (event.target.matches("circle")) hide();
  });
  strips.addEventListener("click", (event) => {
    if (event.target.matches("circle")) location.href = up(`patients/${event.target.dataset.patient}.html`);
  });
}

document.addEventListener("DOMContentLoaded", startStrips);
