"use strict";
// The scan in three planes. Arrays are bytes with x (to the patient's left) fastest, then y (back), then z (head).
const meta = JSON.parse(document.getElementById("meta").textContent);
const [X, Y, Z] = meta.shape;
const [dx, dy, dz] = meta.spacing_mm;
const LIVER = [44, 160, 44], LESION = [230, 159, 0], TRUTH = [86, 180, 233];
const find = (id) => document.getElementById(id);
const state = { at: [...meta.start], low: 0, high: 1, overlays: true, measuring: false, line: null };
const arrays = {};

async function unpack(name) {
  const text = atob(find(`data-${name}`).textContent);
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  arrays[name] = new Uint8Array(await new Response(stream).arrayBuffer());
}

// grey values of the 256 bytes in the current window
const shades = new Uint8Array(256);
const huOfByte = (byte) => {
  const [hu, bytes] = meta.knots;
  let k = 1;
  while (k < bytes.length - 1 && byte > bytes[k]) k++;
  return hu[k - 1] + ((byte - bytes[k - 1]) * (hu[k] - hu[k - 1])) / (bytes[k] - bytes[k - 1]);
};
function updateShades() {
  for (let byte = 0; byte < 256; byte++) {
    shades[byte] = Math.max(0, Math.min(255, (255 * (huOfByte(byte) - state.low)) / (state.high - state.low)));
  }
}

// probability 0..1 from dark violet to yellow
const heat = (p) => [Math.min(255, 68 + 190 * p * p), Math.min(255, 10 + 225 * p), Math.max(30, 90 + 60 * p - 120 * p * p)];

// each plane: axes of its columns and rows, and whether rows run downwards
const PLANES = {
  axial: { axis: 2, columns: 0, rows: 1, flip: false },
  coronal: { axis: 1, columns: 0, rows: 2, flip: true },
  sagittal: { axis: 0, columns: 1, rows: 2, flip: true },
};
const SIZES = [X, Y, Z], SPACING = [dx, dy, dz], STRIDES = [1, X, X * Y];

function draw(name) {
  const plane = PLANES[name], canvas = find(name);
  const width = SIZES[plane.columns], height = SIZES[plane.rows];
  const image = new ImageData(width, height);
  const { grey, flags, lesions, probability } = arrays;
  const stepC = STRIDES[plane.columns], stepR = STRIDES[plane.rows];
  const base = state.at[plane.axis] * STRIDES[plane.axis];
  const on = (id) => state.overlays && find(id)?.checked;
  const shown = { liver: on("show-liver"), lesions: on("show-lesions"), truth: on("show-truth"), heat: on("show-probability") };
  const opacity = find("opacity").value / 100;
  const inside = (kind, at) =>
    kind === 0 ? flags[at] & 1 : kind === 1 ? lesions[at] > 0 : flags[at] & 2;
  const kinds = [[0, shown.liver, LIVER], [2, shown.truth, TRUTH], [1, shown.lesions, LESION]].filter((each) => each[1]);
  for (let row = 0; row < height; row++) {
    const r = plane.flip ? height - 1 - row : row;
    for (let column = 0; column < width; column++) {
      const at = base + column * stepC + r * stepR;
      let red = shades[grey[at]], green = red, blue = red;
      const mix = (colour, share) => {
        red += (colour[0] - red) * share;
        green += (colour[1] - green) * share;
        blue += (colour[2] - blue) * share;
      };
      if (shown.heat && flags[at] & 1) mix(heat(probability[at] / 255), opacity);
      for (const [kind, , colour] of kinds) {
        if (!inside(kind, at)) continue;
        const edge =
          column === 0 || column === width - 1 || r === 0 || r === height - 1 ||
          !inside(kind, at - stepC) || !inside(kind, at + stepC) || !inside(kind, at - stepR) || !inside(kind, at + stepR);
        const dashed = kind === 2 && (column + row) % 4 > 1;
        if (edge ? !dashed : kind === 1) mix(colour, edge ? 1 : opacity / 2);
      }
      image.data.set([red, green, blue, 255], 4 * (row * width + column));
    }
  }
  const scale = Math.max(1, Math.round(900 / width));
  canvas.width = width * scale;
  canvas.height = Math.round((canvas.width * height * SPACING[plane.rows]) / (width * SPACING[plane.columns]));
  const small = Object.assign(document.createElement("canvas"), { width, height });
  small.getContext("2d").putImageData(image, 0, 0);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  drawLines(name, pen, canvas);
}

function toCanvas(name, at) {
  const plane = PLANES[name], canvas = find(name);
  const row = plane.flip ? SIZES[plane.rows] - 1 - at[plane.rows] : at[plane.rows];
  return [((at[plane.columns] + 0.5) * canvas.width) / SIZES[plane.columns], ((row + 0.5) * canvas.height) / SIZES[plane.rows]];
}

function drawLines(name, pen, canvas) {
  const [x, y] = toCanvas(name, state.at);
  pen.strokeStyle = "rgba(125, 184, 245, 0.45)";
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x, 0); pen.lineTo(x, canvas.height); pen.moveTo(0, y); pen.lineTo(canvas.width, y);
  pen.stroke();
  if (state.line?.plane !== name) return;
  pen.strokeStyle = "#ffe14d";
  pen.lineWidth = 3;
  pen.beginPath();
  pen.moveTo(...toCanvas(name, state.line.from)); pen.lineTo(...toCanvas(name, state.line.to));
  pen.stroke();
}

function voxelUnder(name, event) {
  const plane = PLANES[name], rect = find(name).getBoundingClientRect(), at = [...state.at];
  const clamp = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value * size)));
  at[plane.columns] = clamp((event.clientX - rect.left) / rect.width, SIZES[plane.columns]);
  const row = clamp((event.clientY - rect.top) / rect.height, SIZES[plane.rows]);
  at[plane.rows] = plane.flip ? SIZES[plane.rows] - 1 - row : row;
  return at;
}

let waiting = false;
function update() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    Object.keys(PLANES).forEach(draw);
    describe();
  });
}

function describe() {
  const z = state.at[2], number = z + meta.first;
  const at = state.at[0] + X * (state.at[1] + Y * z);
  const lesion = arrays.lesions[at];
  const text = `axial, z = ${number}`;
  find("axial-text").textContent = text;
  find("slice").value = z;
  find("slice").setAttribute("aria-valuetext", `slice ${number}`);
  find("state").textContent =
    `Slice ${number} of ${meta.first} to ${meta.first + Z - 1}. At the cross: ${Math.round(huOfByte(arrays.grey[at]))} HU` +
    (lesion ? `, lesion ${lesion}.` : arrays.flags[at] & 1 ? ", liver." : ".");
  for (const row of document.querySelectorAll("#lesions tbody tr")) {
    row.setAttribute("aria-current", String(+row.dataset.lesion === lesion && lesion > 0));
  }
}

function move(axis, by) {
  state.at[axis] = Math.max(0, Math.min(SIZES[axis] - 1, state.at[axis] + by));
  update();
}

function setWindow(low, high) {
  state.low = Math.round(low);
  state.high = Math.max(Math.round(high), state.low + 10);
  find("low").value = state.low;
  find("high").value = state.high;
  for (const button of document.querySelectorAll("[data-window]")) {
    const [first, last] = meta.windows[button.dataset.window];
    button.setAttribute("aria-pressed", String(first === state.low && last === state.high));
  }
  updateShades();
  update();
}

function setMeasuring(on) {
  state.measuring = on;
  if (!on) { state.line = null; find("distance").textContent = ""; }
  find("measure").setAttribute("aria-pressed", String(on));
  update();
}

function listen(name) {
  const canvas = find(name), plane = PLANES[name];
  let start = null;
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); move(plane.axis, event.deltaY > 0 ? -1 : 1); }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -1e6, End: 1e6 };
    if (event.key in steps) { event.preventDefault(); move(plane.axis, steps[event.key]); }
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = { x: event.clientX, y: event.clientY, low: state.low, high: state.high, moved: false };
    if (state.measuring) { const at = voxelUnder(name, event); state.line = { plane: name, from: at, to: at }; }
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [right, down] = [event.clientX - start.x, event.clientY - start.y];
    start.moved ||= Math.hypot(right, down) > 4;
    if (state.measuring) {
      state.line.to = voxelUnder(name, event);
      const mm = Math.hypot(...state.line.to.map((value, axis) => (value - state.line.from[axis]) * SPACING[axis]));
      find("distance").textContent = `${mm.toFixed(1)} mm`;
      update();
    } else if (start.moved) {
      const [centre, width] = [(start.low + start.high) / 2 + down, Math.max(10, start.high - start.low + 2 * right)];
      setWindow(centre - width / 2, centre + width / 2);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (start && !start.moved && !state.measuring) { state.at = voxelUnder(name, event); update(); }
    start = null;
  });
}

function showLesion(number) {
  const place = meta.places[number - 1];
  if (place) { state.at = [...place]; update(); }
}

function drawMarks() {
  const canvas = find("marks"), pen = canvas.getContext("2d");
  canvas.width = 1000;
  const mark = (planes, colour, top) => {
    pen.fillStyle = colour;
    for (const z of planes) pen.fillRect((z * 1000) / Z, top, Math.max(1, 1000 / Z), 6);
  };
  mark(meta.marks.prediction, "#e69f00", 0);
  mark(meta.marks.differs, "#56b4e9", 8);
}

async function main() {
  await Promise.all(["grey", "flags", "lesions", "probability"].map(unpack));
  find("slice").max = Z - 1;
  find("slice").addEventListener("input", () => move(2, find("slice").value - state.at[2]));
  Object.keys(PLANES).forEach(listen);
  const names = Object.keys(meta.windows);
  for (const button of document.querySelectorAll("[data-window]")) {
    button.addEventListener("click", () => setWindow(...meta.windows[button.dataset.window]));
  }
  for (const id of ["low", "high"]) {
    find(id).addEventListener("change", () => setWindow(+find("low").value, +find("high").value));
  }
  for (const id of ["show-liver", "show-lesions", "show-truth", "show-probability", "opacity"]) {
    find(id)?.addEventListener("input", update);
  }
  find("measure").addEventListener("click", () => setMeasuring(!state.measuring));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches?.("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (names[event.key - 1]) setWindow(...meta.windows[names[event.key - 1]]);
    if (event.key === "o") { state.overlays = !state.overlays; update(); }
    if (event.key === "m") setMeasuring(!state.measuring);
  });
  for (const button of document.querySelectorAll("[data-place]")) {
    button.addEventListener("click", () => showLesion(button.dataset.place));
  }
  const follow = () => showLesion(/^#lesion-(\d+)$/.exec(location.hash)?.[1]);
  addEventListener("hashchange", follow);
  follow();
  drawMarks();
  setWindow(...meta.windows[names[0]]);
}

main().catch(() => { find("state").textContent = "This browser cannot show the scan. It needs DecompressionStream."; });
