"use strict";
// The gallery: filters, a threshold that recounts, heat maps over the pictures, and a dialog with zoom.
(() => {
  const BATCH = 120;
  const find = (id) => document.getElementById(`g-${id}`);
  const parts = JSON.parse(find("data").textContent);
  const state = { part: parts[0], threshold: 0, shown: [], drawn: 0, open: -1, zoom: 1, x: 0, y: 0 };
  const text = (number) => (+number.toPrecision(5)).toString();
  const element = (name, values, ...children) => {
    const made = Object.assign(document.createElement(name), values);
    made.append(...children);
    return made;
  };

  // colours of the 256 levels of a map, as in the report's colour bar
  let palette = null;
  async function loadPalette() {
    const bar = await loaded(/url\((.*)\)/.exec(getComputedStyle(document.querySelector(".colours")).backgroundImage)[1].replace(/^"|"$/g, ""));
    const pen = element("canvas", { width: 256, height: 1 }).getContext("2d");
    pen.drawImage(bar, 0, 0, 256, 1);
    palette = pen.getImageData(0, 0, 256, 1).data;
  }
  async function loaded(source) {
    const image = element("img", { src: source });
    await image.decode();
    return image;
  }

  // Draw an image's map. With `base`, the map lies over the picture, and high scores are more opaque.
  async function drawMap(canvas, item, base, opacity) {
    const levels = await loaded(item.map);
    const small = element("canvas", { width: levels.naturalWidth, height: levels.naturalHeight });
    const pen = small.getContext("2d", { willReadFrequently: true });
    pen.drawImage(levels, 0, 0);
    const pixels = pen.getImageData(0, 0, small.width, small.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const level = pixels.data[i];
      pixels.data.set(palette.subarray(4 * level, 4 * level + 3), i);
    }
    pen.putImageData(pixels, 0, 0);
    const [width, height] = item.size[0] ? item.size : [small.width, small.height];
    canvas.width = width; canvas.height = height;
    const over = canvas.getContext("2d");
    if (base && item.picture) over.drawImage(await loaded(item.picture), 0, 0, width, height);
    over.globalAlpha = opacity;
    over.drawImage(small, 0, 0, width, height);
  }

  const flagged = (item) => item.score >= state.threshold;
  const labelOf = (item) => (item.anomalous === null ? "" : item.anomalous ? "anomalous" : "normal");
  const range = () => {
    const scores = state.part.images.map((item) => item.score);
    const [low, high] = [scores.reduce((a, b) => Math.min(a, b)), scores.reduce((a, b) => Math.max(a, b))];
    return [low, high + (high - low || Math.abs(high) || 1) / 1000]; // at the end nothing is flagged
  };

  function choosePart(number) {
    state.part = parts[number];
    const folders = [...new Set(state.part.images.map((item) => item.folder))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    find("folder").replaceChildren(element("option", { value: "", textContent: "all" }), ...folders.filter(Boolean).map((name) => element("option", { value: `/${name}`, textContent: name })));
    find("folder").closest("label").hidden = folders.length < 2;
    find("label").closest("label").hidden = state.part.images.every((item) => item.anomalous === null);
    const [low, high] = range();
    Object.assign(find("slider"), { min: low, max: high });
    find("low").value = find("high").value = "";
    find("reset").hidden = state.part.threshold === null;
    setThreshold(state.part.threshold ?? high);
  }

  function setThreshold(value) {
    state.threshold = value;
    find("slider").value = value;
    find("slider").setAttribute("aria-valuetext", text(value));
    if (document.activeElement !== find("threshold")) find("threshold").value = text(value);
    select();
  }

  function select() {
    const wanted = { folder: find("folder").value, label: find("label").value, flagged: find("flagged").value };
    const low = find("low").value === "" ? -Infinity : +find("low").value;
    const high = find("high").value === "" ? Infinity : +find("high").value;
    state.shown = state.part.images.filter((item) =>
      (!wanted.folder || item.folder === wanted.folder.slice(1)) &&
      (!wanted.label || String(item.anomalous) === wanted.label) &&
      (!wanted.flagged || String(flagged(item)) === wanted.flagged) &&
      item.score >= low && item.score <= high);
    const order = find("order").value;
    if (order === "up") state.shown.reverse();
    if (order === "name") state.shown.sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
    count();
    state.drawn = 0;
    find("tiles").replaceChildren();
    drawMore();
  }

  function count() {
    const all = state.part.images, bad = all.filter((item) => item.anomalous), good = all.filter((item) => item.anomalous === false);
    const share = (items) => `${items.filter(flagged).length} of ${items.length}`;
    let line = `${share(all)} images flagged at ${text(state.threshold)} or more`;
    if (bad.length) line += `; ${share(bad)} anomalous ones found`;
    if (good.length) line += `; ${share(good)} normal ones flagged`;
    find("count").textContent = `${line}. ${state.shown.length} shown.`;
  }

  function tile(item, number) {
    const image = element("img", { src: item.picture || item.map, loading: "lazy", alt: `${item.id}${item.picture ? "" : ", heat map only"}` });
    const picture = element("span", { className: "picture" }, image);
    const label = labelOf(item);
    const facts = element("span", { className: "text" }, element("strong", { textContent: text(item.score) }), label ? ` ${label} ` : " ");
    if (flagged(item)) facts.append(element("span", { className: "flag", textContent: "flagged" }));
    const button = element("button", { type: "button", className: "tile" }, picture, facts, element("span", { className: "text", textContent: item.id }));
    button.dataset.flagged = flagged(item);
    const show = async () => {
      if (picture.querySelector("canvas")) return;
      const canvas = element("canvas");
      picture.append(canvas);
      await drawMap(canvas, item, true, 0.65);
    };
    const hide = () => { if (!find("heat").checked) picture.querySelector("canvas")?.remove(); };
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, show);
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, hide);
    button.addEventListener("click", () => openImage(number));
    if (find("heat").checked) show();
    return element("li", {}, button);
  }

  function drawMore() {
    const next = state.shown.slice(state.drawn, state.drawn + BATCH);
    find("tiles").append(...next.map((item, i) => tile(item, state.drawn + i)));
    state.drawn += next.length;
    find("more").hidden = state.drawn >= state.shown.length;
    find("more").textContent = `Show more (${state.shown.length - state.drawn})`;
  }

  function openImage(number) {
    const item = state.shown[number];
    if (!item) return;
    state.open = number;
    find("title").textContent = item.id;
    const rank = 1 + state.part.images.filter((other) => other.score > item.score).length;
    find("facts").textContent = [`score ${text(item.score)}`, `rank ${rank} of ${state.part.images.length}`, flagged(item) ? "flagged" : "not flagged", labelOf(item)].filter(Boolean).join(", ");
    find("picture").replaceChildren(element("img", { src: item.picture || item.map, alt: `${item.id}: image` }));
    find("map").setAttribute("aria-label", `${item.id}: heat map`);
    find("full").hidden = !item.full;
    if (item.full) find("full").href = item.full;
    find("previous").disabled = number === 0;
    find("next").disabled = number === state.shown.length - 1;
    drawMap(find("map"), item, true, find("opacity").value / 100);
    zoomTo(1, 0, 0);
    if (!find("dialog").open) find("dialog").showModal();
  }

  function zoomTo(zoom, x, y) {
    Object.assign(state, { zoom: Math.max(1, Math.min(16, zoom)), x, y });
    if (state.zoom === 1) state.x = state.y = 0;
    for (const pane of document.querySelectorAll(".zoomed > *")) pane.style.transform = `translate(${state.x}px, ${state.y}px) scale(${state.zoom})`;
  }

  function save() {
    const quoted = (value) => `"${String(value).replace(/"/g, '""').replace(/^[=+\-@]/, "'$&")}"`;
    const rows = state.shown.map((item) => [quoted(item.id), item.score, flagged(item) ? 1 : 0, labelOf(item)].join(","));
    const content = ["id,score,flagged,label", ...rows].join("\n") + "\n";
    const link = element("a", { href: URL.createObjectURL(new Blob([content], { type: "text/csv" })), download: "images.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    find("save").dataset.saved = content;
  }

  function listen() {
    find("category").addEventListener("change", () => choosePart(+find("category").value));
    for (const id of ["folder", "label", "flagged", "low", "high", "order"]) find(id).addEventListener("change", select);
    find("slider").addEventListener("input", () => setThreshold(+find("slider").value));
    find("threshold").addEventListener("input", () => { if (find("threshold").value !== "") setThreshold(+find("threshold").value); });
    find("reset").addEventListener("click", () => setThreshold(state.part.threshold));
    find("save").addEventListener("click", save);
    find("more").addEventListener("click", drawMore);
    find("heat").addEventListener("change", select);
    new IntersectionObserver((seen) => { if (seen[0].isIntersecting && !find("more").hidden) drawMore(); }).observe(find("more"));
    find("close").addEventListener("click", () => find("dialog").close());
    find("previous").addEventListener("click", () => openImage(state.open - 1));
    find("next").addEventListener("click", () => openImage(state.open + 1));
    find("in").addEventListener("click", () => zoomTo(state.zoom * 1.5, state.x * 1.5, state.y * 1.5));
    find("out").addEventListener("click", () => zoomTo(state.zoom / 1.5, state.x / 1.5, state.y / 1.5));
    find("opacity").addEventListener("input", () => drawMap(find("map"), state.shown[state.open], true, find("opacity").value / 100));
    find("dialog").addEventListener("close", () => find("tiles").children[state.open]?.firstChild.focus());
    find("dialog").addEventListener("keydown", (event) => {
      if (event.target.matches("input")) return;
      const steps = { ArrowLeft: () => openImage(state.open - 1), ArrowRight: () => openImage(state.open + 1),
        "+": () => find("in").click(), "-": () => find("out").click(), 0: () => zoomTo(1, 0, 0) };
      if (steps[event.key]) { event.preventDefault(); steps[event.key](); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "h" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select")) return;
      find("heat").checked = !find("heat").checked;
      select();
    });
    for (const pane of document.querySelectorAll(".zoomed")) {
      let start = null;
      pane.addEventListener("wheel", (event) => {
        event.preventDefault();
        const factor = event.deltaY < 0 ? 1.2 : 1 / 1.2;
        zoomTo(state.zoom * factor, state.x * factor, state.y * factor);
      }, { passive: false });
      pane.addEventListener("pointerdown", (event) => { start = [event.clientX - state.x, event.clientY - state.y]; pane.setPointerCapture(event.pointerId); });
      pane.addEventListener("pointermove", (event) => { if (start) zoomTo(state.zoom, event.clientX - start[0], event.clientY - start[1]); });
      pane.addEventListener("pointerup", () => { start = null; });
    }
  }

  loadPalette().then(() => { listen(); choosePart(0); find("tiles").dataset.ready = "true"; });
})();
