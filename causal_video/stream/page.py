"""The page of `WorldServer`: one file, no other sources, light and dark as the browser asks for."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fewstep world</title>
<link rel="icon" href="data:,">
<style>
:root { --ground: #f6f6f4; --card: #ffffff; --ink: #1c1c1a; --soft: #6b6b66; --line: #dcdcd6; --accent: #2f6f5e;
  --on-accent: #ffffff; --bad: #a33333; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161715; --card: #20221f; --ink: #ecece6; --soft: #a0a198; --line: #363932; --accent: #6fc2a8;
    --on-accent: #10221c; --bad: #f08a8a; }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 24px 20px; display: grid; gap: 20px;
  grid-template-columns: minmax(0, 1fr) 280px; }
header { grid-column: 1 / -1; display: flex; align-items: baseline; justify-content: space-between; gap: 16px; }
h1 { font-size: 18px; font-weight: 600; margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
canvas { width: 100%; display: block; border-radius: 6px; background: #000; image-rendering: pixelated; }
.facts { color: var(--soft); font-variant-numeric: tabular-nums; margin: 12px 0 0; font-size: 13px; min-height: 20px; }
aside { display: grid; gap: 16px; align-content: start; }
h2 { font-size: 13px; font-weight: 600; margin: 0 0 10px; color: var(--soft); }
button, input, select { font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--line);
  border-radius: 6px; padding: 7px 10px; width: 100%; min-width: 0; }
button { cursor: pointer; }
button:hover:not(:disabled) { border-color: var(--accent); }
button:focus-visible, input:focus-visible, select:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 1px; }
button:disabled { opacity: .45; cursor: default; }
button.main, button.held { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
.row { display: flex; gap: 8px; }
.row + .row, form > * + * { margin-top: 8px; }
.pad { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.pad [data-key=up] { grid-column: 2; }
.pad [data-key=left] { grid-column: 1; grid-row: 2; }
.pad [data-key=down] { grid-column: 2; grid-row: 2; }
.pad [data-key=right] { grid-column: 3; grid-row: 2; }
.words { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 6px; }
.words button { width: auto; }
.hint { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
#error { color: var(--bad); font-size: 13px; margin: 8px 0 0; min-height: 20px; overflow-wrap: anywhere; }
@media (max-width: 720px) { main { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<main>
<header><h1>fewstep world</h1><span id="steering" class="hint" style="margin:0"></span></header>
<section class="card">
  <canvas id="screen" width="32" height="32" role="img" aria-label="the video"></canvas>
  <p class="facts" id="facts"></p>
  <p id="error" role="status"></p>
</section>
<aside>
  <section class="card">
    <h2>Steer</h2>
    <div class="pad" id="pad"></div><div class="words" id="words"></div>
    <p class="hint" id="hint">Hold the arrow keys or a button.</p>
  </section>
  <section class="card">
    <h2>Prompt</h2>
    <form id="form">
      <input id="prompt" aria-label="prompt" autocomplete="off">
      <div class="row"><select id="mode" aria-label="what a new prompt does to the past">
        <option value="recache">recache</option><option value="cross_only">cross only</option>
        <option value="hard">hard cut</option></select><button>Switch</button></div>
    </form>
  </section>
  <section class="card">
    <h2>Stream</h2>
    <div class="row"><button class="main" id="play">Pause</button><button id="reset">Reset</button></div>
    <div class="row"><button id="save">Snapshot</button><button id="restore" disabled>Restore</button></div>
    <div class="row" hidden><select id="snapshots" aria-label="snapshot to restore"></select></div>
  </section>
</aside>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);
const screen_ = $("screen"), pen = screen_.getContext("2d");
const ARROWS = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down"};
const SIGNS = {left: "\\u2190", right: "\\u2192", up: "\\u2191", down: "\\u2193"};
let rate = 16, actions = [], held = [], queue = [], playing = true, version = 0, buttons = {};

async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : {method: "POST", body: JSON.stringify(body),
    headers: {"Content-Type": "application/json"}});
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}
function show(status) {
  rate = status.rate; actions = status.actions;
  if (screen_.width !== status.size[1] || screen_.height !== status.size[0]) {
    screen_.width = status.size[1]; screen_.height = status.size[0];
  }
  if (document.activeElement !== $("prompt")) $("prompt").value = status.prompt;
  $("steering").textContent = {actions: "steered by actions", prompt: "steered by its prompt",
    none: "no steering: write {action} into the prompt"}[status.steering];
  if (Object.keys(buttons).join() !== actions.join()) makeButtons();
  $("hint").hidden = actions.length === 0;
  const chosen = $("snapshots").value;
  $("snapshots").replaceChildren(...status.snapshots.map(n => new Option("snapshot " + n, n)));
  if (status.snapshots.map(String).includes(chosen)) $("snapshots").value = chosen;
  $("restore").disabled = $("snapshots").parentElement.hidden = status.snapshots.length === 0;
}
function makeButtons() {
  buttons = {}; $("pad").replaceChildren(); $("words").replaceChildren();
  for (const name of actions) {
    const button = document.createElement("button");
    button.type = "button"; button.dataset.key = name; button.textContent = SIGNS[name] || name;
    button.setAttribute("aria-label", name);
    button.addEventListener("pointerdown", () => hold(name));
    for (const kind of ["pointerup", "pointerleave", "pointercancel"])
      button.addEventListener(kind, () => release(name));
    $(name in SIGNS ? "pad" : "words").append(button); buttons[name] = button;
  }
}
function hold(name) { if (actions.includes(name) && !held.includes(name)) held.push(name); mark(); }
function release(name) { held = held.filter(other => other !== name); mark(); }
function mark() { for (const name in buttons) buttons[name].classList.toggle("held", held.at(-1) === name); }
const typing = event => ["INPUT", "SELECT"].includes(event.target.tagName);
addEventListener("keydown", event => { const name = ARROWS[event.key];
  if (name && !typing(event)) { event.preventDefault(); hold(name); } });
addEventListener("keyup", event => { if (ARROWS[event.key]) release(ARROWS[event.key]); });
addEventListener("blur", () => { held = []; mark(); });

async function change(path, body, jumps = false) {
  try { const status = await ask(path, body); if (jumps) { version += 1; queue = []; } $("error").textContent = "";
    show(status); return status; }
  catch (error) { $("error").textContent = error.message; }
}
$("form").addEventListener("submit", event => { event.preventDefault();
  $("prompt").blur(); change("/prompt", {prompt: $("prompt").value, mode: $("mode").value}); });
$("reset").addEventListener("click", () => change("/reset", {seed: Math.floor(Math.random() * 1e6)}, true));
$("save").addEventListener("click", async () => { const status = await change("/snapshot", {});
  if (status) $("snapshots").value = status.number; });
$("restore").addEventListener("click", () => change("/restore", {number: Number($("snapshots").value)}, true));
$("play").addEventListener("click", () => { playing = !playing; $("play").textContent = playing ? "Pause" : "Play"; });

const pause = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
async function load() {
  for (;;) {
    // One chunk ahead at most: what is not made yet can still be steered.
    if (!playing || queue.length > 2 || document.hidden) { await pause(.02); continue; }
    const asked = version, began = performance.now();
    try {
      const made = await ask("/step", {action: held.at(-1) || "none"});
      const pictures = await Promise.all(made.frames.map(async data => {
        const image = new Image(); image.src = "data:image/png;base64," + data; await image.decode(); return image; }));
      if (asked === version) queue.push(...pictures);
      const speed = made.frames.length / made.seconds;
      $("facts").textContent = `chunk ${made.chunk}, ${Math.round(performance.now() - began)} ms for ` +
        `${made.frames.length} frames; the student makes ${speed.toFixed(1)} a second, shown at ${rate}`;
      $("error").textContent = "";
    } catch (error) { $("error").textContent = error.message; await pause(1); }
  }
}
async function draw() {
  for (;;) {
    if (playing && queue.length) pen.drawImage(queue.shift(), 0, 0);
    await pause(1 / rate);
  }
}
ask("/status").then(status => { show(status); load(); draw(); }, error => { $("error").textContent = error.message; });
</script>
</body>
</html>
"""
