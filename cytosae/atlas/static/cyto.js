// Data that arrives in files (each calls CYTO.add(name, value); nothing is fetched), and short words for making elements.
"use strict";

const CYTO = (() => {
  const arrived = new Map(); // name -> value
  const waiting = new Map(); // name -> [promise, its resolve]
  class Missing extends Error {} // says which file

  function add(name, value) {
    arrived.set(name, value);
    waiting.get(name)?.[1](value);
  }

  // The data of that name; its script is added to the page if it is not there yet. Rejects if there is no such file.
  function load(name) {
    if (arrived.has(name)) return Promise.resolve(arrived.get(name));
    if (!waiting.has(name)) {
      const script = document.createElement("script");
      let resolve;
      const promise = new Promise((done, failed) => {
        resolve = done;
        script.onerror = () => { waiting.delete(name); failed(new Missing(`data/${name}.js`)); };
      });
      waiting.set(name, [promise, resolve]);
      script.src = `${document.body.dataset.up}data/${name}.js`;
      document.head.append(script);
    }
    return waiting.get(name)[0];
  }

  const KINDS = { f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array, i4: Int32Array, i2: Int16Array };

  function bytes(base64) {
    return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  }

  // A packed column as a typed array; half precision becomes float32.
  function unpack(column) {
    const raw = bytes(column.b64).buffer;
    if (column.dtype !== "f2") return new KINDS[column.dtype](raw);
    return Float32Array.from(new Uint16Array(raw), (half) => {
      const exponent = (half >> 10) & 31, fraction = half & 1023;
      if (exponent === 31) return fraction ? NaN : Infinity;
      return exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24; // never negative
    });
  }

  return { add, load, unpack, bytes, Missing };
})();

const $ = (id) => document.getElementById(id);
const up = (path) => document.body.dataset.up + path;
const short = (value) => (Number.isNaN(value) ? "–" : String(Number(value.toPrecision(3))));
const share = (value) => (Number.isNaN(value) ? "–" : `${short(100 * value)}%`);
const whole = (value) => value.toLocaleString("en");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function conceptLink(latent, hasPage) {
  if (hasPage) return element("a", { href: up(`concepts/${latent}.html`) }, String(latent));
  return element("span", { title: "no page was built for this latent" }, String(latent));
}

// Is somebody writing there? Then single letters are no commands.
const isTyping = (event) => event.target.closest("input:not([type=range], [type=checkbox], [type=radio]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
