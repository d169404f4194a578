// Which latents have a page, and the picture of each (cards/<latent>.jpg: its strongest cell and two more).
"use strict";

async function readBuilt() {
  const data = await CYTO.load("built"), [latents, pictured, clusters] = [data.latents, data.has_picture, data.clusters].map(CYTO.unpack);
  const place = new Int32Array(data.n_latents).fill(-1);
  latents.forEach((latent, n) => { place[latent] = n; });
  return {
    anyCluster: clusters.some((cluster) => cluster >= 0),
    has: (latent) => place[latent] >= 0,
    cluster: (latent) => (place[latent] < 0 || clusters[place[latent]] < 0 ? NaN : clusters[place[latent]]),
    picture: (latent) => (place[latent] >= 0 && pictured[place[latent]] ? element("img", { src: up(`cards/${latent}.jpg`), alt: "" }) : null),
  };
}

// What a tip says of a latent: its picture and some lines.
function tipOf(picture, lines) {
  const text = element("div", {}, ...lines.flatMap((line) => [line, element("br")]));
  return picture ? [picture, text] : [text];
}
