// What of a page stands in its address, behind #: filters, order, selection. So a link leads to what one sees.
"use strict";

const ADDRESS = {
  // All that the address says, as text by name.
  read: () => new URLSearchParams(location.hash.slice(1)),

  // Says something else; "" and null take a name out. No step of the browser's history.
  write(changes) {
    const now = ADDRESS.read();
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === "") now.delete(name);
      else now.set(name, value);
    }
    const hash = now.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.href.split("#")[0]);
  },
};

// On a narrow screen the page's own name in the menu is in view.
document.addEventListener("DOMContentLoaded", () => {
  const here = document.querySelector(".top nav [aria-current]");
  if (here) here.closest("nav").scrollLeft = here.offsetLeft - here.closest("nav").offsetLeft - 16;
});

async function copyLink(button) {
  const text = button.textContent;
  try {
    await navigator.clipboard.writeText(location.href);
    button.textContent = "Copied";
  } catch { // some browsers give no clipboard to files: show the link, chosen, to be copied by hand
    const field = element("input", { type: "text", readonly: "", "aria-label": "Link to this view" });
    field.value = location.href;
    button.after(field);
    field.select();
    field.addEventListener("blur", () => field.remove());
    return;
  }
  setTimeout(() => { button.textContent = text; }, 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copyLink(button);
});
