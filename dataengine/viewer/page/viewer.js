// SPDX-License-Identifier: Apache-2.0
// The viewer's page. Whatever comes from a corpus becomes text, never markup.

const $ = (id) => document.getElementById(id);
const PAGE_CLIPS = 60;
const REMEMBERED_PAGES = 20; // in the address; it must not grow without end
const WIDE = matchMedia("(min-width: 901px)");

const state = {
  filter: { where: "", text: "", subset: "" },
  order: "",
  descending: false,
  pages: [""], // what each page starts behind; the last is the one that is shown
  next: null,
  clips: [],
  chosen: -1, // index into clips, -1 if the clip that is shown is not on this page
  clip: null, // what is shown at the side
  siblings: [],
  columns: {},
};

// ------------------------------------------------------------------------------------- small things

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function clock(ms, digits = 0) {
  const tenths = Math.floor(ms / 10 ** (3 - digits));
  const seconds = tenths / 10 ** digits;
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor(seconds / 60) % 60;
  const rest = (seconds - 3600 * hours - 60 * minutes).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

const number = (value, digits = 4) =>
  typeof value !== "number" ? String(value)
    : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(digits)));

const several = (count, name) => `${count.toLocaleString("en")} ${name}${count === 1 ? "" : "s"}`;

const pending = {};

/** Asks the server; a newer question of the same kind takes the place of an older one. */
async function ask(kind, path, parameters = {}) {
  pending[kind]?.abort();
  const controller = (pending[kind] = new AbortController());
  const query = new URLSearchParams(parameters);
  let response;
  try {
    response = await fetch(`${path}?${query}`, { signal: controller.signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { message: "The viewer does not answer any more", hint: "start it again in its terminal" };
  }
  const answer = await response.json();
  if (!response.ok) throw answer;
  return answer;
}

const aborted = (error) => error.name === "AbortError";

function showError(error) {
  const box = $("error");
  box.replaceChildren();
  box.hidden = !error;
  if (!error) return;
  if (error instanceof Error) throw error; // a mistake of this page
  box.append(element("p", { textContent: error.message }));
  const [, names] = (error.hint || "").match(/^columns[^:]*: (.*)$/) || [];
  if (names) box.append(element("div", { className: "hint chips" }, ...names.split(", ").map((name) => columnChip(name))));
  else if (error.hint) box.append(element("p", { className: "hint", textContent: error.hint }));
}

function columnChip(name, kind = "") {
  const chip = element("button", { type: "button", className: "chip", textContent: name, title: "Put it into the condition" });
  if (kind) chip.append(element("small", { textContent: kind.startsWith("STRUCT") ? "struct[]" : kind.toLowerCase() }));
  chip.addEventListener("click", () => {
    const where = $("where");
    where.setRangeText(name, where.selectionStart, where.selectionEnd, "end");
    where.focus();
    fit();
  });
  return chip;
}

function fit() {
  const where = $("where");
  where.style.height = "auto";
  where.style.height = `${Math.min(where.scrollHeight + 2, 160)}px`;
}

// ------------------------------------------------------------------------------------- address

function remember() {
  const parameters = new URLSearchParams();
  for (const [key, value] of Object.entries({ ...state.filter, order: state.order })) if (value) parameters.set(key, value);
  if (state.descending) parameters.set("descending", "true");
  if (state.pages.length > 1) {
    parameters.set("page", state.pages.length);
    parameters.set("pages", JSON.stringify(state.pages.slice(1).slice(-REMEMBERED_PAGES)));
  }
  if (state.clip) parameters.set("clip", state.clip.clip_id);
  const text = parameters.toString();
  history.replaceState(null, "", text ? `/#${text}` : "/");
}

function recall() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  for (const key of ["where", "text", "subset"]) if (parameters.has(key)) state.filter[key] = parameters.get(key);
  state.order = parameters.get("order") || "";
  state.descending = parameters.get("descending") === "true";
  try {
    const pages = JSON.parse(parameters.get("pages") || "[]").filter((page) => typeof page === "string");
    const forgotten = Math.min(Number(parameters.get("page")) || 1, 1e6) - 1 - pages.length;
    state.pages = ["", ...Array(Math.max(0, forgotten)).fill(null), ...pages];
  } catch {
    state.pages = [""];
  }
  return parameters.get("clip");
}

// ------------------------------------------------------------------------------------- pages

const parameters = () => ({ ...state.filter, order: state.order, descending: state.descending });

/** Shows what the fields say, from the first page. */
async function applyFilter() {
  state.filter = { where: $("where").value, text: $("text").value, subset: $("subset").value };
  state.order = $("order").value;
  state.pages = [""];
  await Promise.all([loadPage("first"), loadCount()]);
}

async function loadPage(pick) {
  const results = $("results");
  results.classList.add("busy");
  $("show").textContent = "…";
  try {
    const page = await ask("page", "/api/clips", { ...parameters(), after: state.pages.at(-1), limit: PAGE_CLIPS });
    showError(null);
    state.clips = page.clips;
    state.next = page.next;
    state.chosen = -1;
    showPercentiles(page.percentiles);
    showClips();
    const first = pick === "last" ? page.clips.length - 1 : 0;
    if (pick && page.clips.length && (WIDE.matches || !$("detail").hidden)) choose(first);
    else if (!page.clips.length) closeClip();
    else remember();
    for (const kind of ["csv", "jsonl", "parquet"]) $(kind).href = `/api/export?${new URLSearchParams({ ...parameters(), format: kind })}`;
  } catch (error) {
    if (aborted(error)) return; // a newer question is on its way
    showPercentiles([]);
    showError(error);
    $("show").textContent = "Show";
    return; // what is left of the filter before stays pale
  }
  results.classList.remove("busy");
  $("show").textContent = "Show";
}

async function loadCount() {
  $("count").textContent = "counting…";
  try {
    const { clips, videos, hours } = await ask("count", "/api/count", state.filter);
    const long = hours >= 1 ? `${number(hours)} h` : `${number(hours * 60, 3)} min`;
    $("count").replaceChildren(element("b", { textContent: several(clips, "clip") }), ` of ${several(videos, "video")}, ${long}`);
  } catch (error) {
    if (!aborted(error)) $("count").textContent = "";
  }
}

function showPercentiles(percentiles) {
  const texts = percentiles.map(({ column, percent, value }) => {
    const [, plain] = value.match(/^cast\('(.*)' as [^']*\)$/i) || [null, value];
    const short = Number.isFinite(Number(plain)) ? number(Number(plain), 6) : plain;
    return `p${percent} of ${column.replaceAll('"', "")} is ${short}`;
  });
  $("percentiles").replaceChildren(...[...new Set(texts)].map((textContent) => element("span", { textContent })));
}

function showClips() {
  const named = !["", "video_id", "clip_id", "start_ms", "end_ms", "duration_ms", "caption"].includes(state.order);
  const tiles = state.clips.map((clip, index) => {
    const poster = element("div", { className: "poster" },
      element("img", { src: `/media/poster?id=${encodeURIComponent(clip.clip_id)}`, alt: "", loading: "lazy", decoding: "async" }),
      element("span", { className: "length", textContent: clock(clip.duration_ms, 1) }));
    const value = clip[state.order];
    if (named && value != null) poster.append(element("span", { className: "value", textContent: typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : value }));
    const tile = element("button", { type: "button", className: "clip", title: clip.clip_id }, poster,
      element("p", { textContent: clip.caption ?? "no caption", className: clip.caption == null ? "soft" : "" }));
    tile.addEventListener("click", () => choose(index, { play: true }));
    return element("li", {}, tile);
  });
  $("clips").replaceChildren(...tiles);
  $("results").scrollTop = 0;
  $("empty").hidden = tiles.length > 0;
  $("previous").disabled = state.pages.at(-2) == null;
  $("next").disabled = !state.next;
  $("page").textContent = `page ${state.pages.length}`;
}

async function turn(forward, pick = "first") {
  if (forward ? !state.next : state.pages.at(-2) == null) return;
  if (forward) state.pages.push(state.next);
  else state.pages.pop();
  state.next = null;
  await loadPage(pick);
}

// ------------------------------------------------------------------------------------- one clip

function mark() {
  document.querySelectorAll(".clip").forEach((tile, index) => tile.classList.toggle("chosen", index === state.chosen));
}

/** Shows a clip of the page at the side. */
function choose(index, { play = false } = {}) {
  if (!state.clips[index]) return;
  state.chosen = index;
  mark();
  $("clips").children[index].scrollIntoView({ block: "nearest" });
  showClip(state.clips[index].clip_id, { play });
}

async function showClip(id, { play = false } = {}) {
  const player = $("player");
  if (state.clip?.clip_id === id && !$("detail").hidden) {
    if (play) player.play().catch(() => {});
    return;
  }
  $("detail").hidden = false;
  player.pause();
  player.hidden = false;
  $("no-video").hidden = true;
  $("frames").classList.remove("large");
  player.poster = `/media/poster?id=${encodeURIComponent(id)}`;
  player.src = `/media/video?id=${encodeURIComponent(id)}`;
  if (play) player.play().catch(() => {});
  state.clip = { clip_id: id };
  remember();
  try {
    const { clip, siblings } = await ask("clip", "/api/clip", { id });
    state.clip = clip;
    state.siblings = siblings;
    showTimeline();
    showFrames();
    showFacts();
    $("detail").scrollTop = 0;
  } catch (error) {
    if (aborted(error)) return;
    if (error instanceof Error) throw error;
    for (const part of ["timeline", "frames"]) $(part).replaceChildren();
    $("place").textContent = "";
    $("facts").replaceChildren(element("p", { textContent: error.message }));
  }
}

function closeClip() {
  pending.clip?.abort();
  $("player").pause();
  $("player").removeAttribute("src");
  $("player").load();
  $("detail").hidden = true;
  state.clip = null;
  state.siblings = [];
  remember();
  $("clips").children[state.chosen]?.firstChild.focus();
}

function showTimeline() {
  const { siblings, clip } = state;
  const here = siblings.findIndex(({ clip_id }) => clip_id === clip.clip_id);
  $("place").textContent =
    `clip ${number(here + 1)} of ${number(siblings.length)} in this video, ${clock(clip.start_ms)} to ${clock(clip.end_ms)}`;
  $("before").disabled = here <= 0;
  $("behind").disabled = here < 0 || here + 1 >= siblings.length;
  const end = Math.max(1, ...siblings.map(({ end_ms }) => end_ms));
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  const attributes = (node, values) => Object.entries(values).forEach(([key, value]) => node.setAttribute(key, value));
  attributes(drawing, { viewBox: "0 0 1000 22", preserveAspectRatio: "none", role: "img", "aria-label": "Clips of this video" });
  siblings.forEach((sibling, index) => {
    const bar = document.createElementNS(space, "rect");
    const left = (1000 * sibling.start_ms) / end;
    const width = (1000 * (sibling.end_ms - sibling.start_ms)) / end;
    attributes(bar, { x: left, y: 3, width: Math.max(1, width - Math.min(2, width / 4)), height: 16 });
    bar.classList.toggle("here", index === here);
    bar.dataset.clip = sibling.clip_id;
    const title = document.createElementNS(space, "title");
    title.textContent = `${clock(sibling.start_ms)} to ${clock(sibling.end_ms)}: ${sibling.caption ?? "no caption"}`;
    bar.append(title);
    drawing.append(bar);
  });
  drawing.addEventListener("click", (event) => {
    const id = event.target.closest("rect")?.dataset.clip;
    if (id) goTo(id);
  });
  $("timeline").replaceChildren(drawing, element("div", { className: "ends" },
    element("span", { textContent: clock(0) }), element("span", { textContent: clock(end) })));
}

/** Shows a clip that may not be on this page. */
function goTo(id) {
  state.chosen = state.clips.findIndex(({ clip_id }) => clip_id === id);
  mark();
  showClip(id, { play: !$("player").paused });
}

function step(distance) {
  const here = state.siblings.findIndex(({ clip_id }) => clip_id === state.clip?.clip_id);
  const sibling = state.siblings[here + distance];
  if (here >= 0 && sibling) goTo(sibling.clip_id);
}

function seek(ms) {
  const player = $("player");
  if (!player.hidden) player.currentTime = Math.max(0, (ms - state.clip.start_ms) / 1000);
}

function showFrames() {
  const times = state.clip.frame_ms || [];
  $("frames").replaceChildren(...times.map((ms, index) => {
    const at = `${clock(ms, 1)}`;
    const button = element("button", { type: "button", title: `frame at ${at}` },
      element("img", { src: `/media/frame?id=${encodeURIComponent(state.clip.clip_id)}&n=${index}`, alt: `frame at ${at}`, loading: "lazy" }));
    button.addEventListener("click", () => seek(ms));
    return button;
  }));
}

const list = (rows, className = "") => element("dl", { className }, ...rows.flatMap(([name, value]) => [
  element("dt", { textContent: name.replaceAll("_", " ") }), element("dd", {}, value)]));

function showFacts() {
  const { clip, columns } = state;
  const rest = { ...clip };
  const take = (name) => { const value = rest[name]; delete rest[name]; return value; };
  const parts = [];
  const main = take("caption");
  parts.push(element("p", { className: main == null ? "caption soft" : "caption", textContent: main ?? "no caption" }));

  const segments = take("transcript_segments") || [];
  const captions = [];
  const said = new Map(main == null ? [] : [[main, "caption"]]);
  for (const name of Object.keys(clip).filter((name) => /^(caption|transcript)/.test(name) && name in rest)) {
    const value = take(name);
    if (value == null || value.length === 0) continue;
    const text = Array.isArray(value) ? [...new Set(value)].join("\n") : String(value);
    captions.push([name, said.has(text) ? element("span", { className: "soft", textContent: `the same as ${said.get(text)}` }) : text]);
    if (!said.has(text)) said.set(text, name.replaceAll("_", " "));
  }
  if (captions.length) parts.push(element("h3", { textContent: "Captions and speech" }), list(captions));
  if (segments.length > 1) parts.push(element("details", {}, element("summary", { textContent: `${segments.length} pieces of speech` }),
    ...segments.map(({ start_ms, text }) => {
      const line = element("button", { type: "button", className: "segment" },
        element("time", { textContent: clock(start_ms, 1) }), element("span", { textContent: text }));
      line.addEventListener("click", () => seek(start_ms));
      return line;
    })));

  const scores = Object.entries(rest).filter(([name, value]) => /score/.test(name) && value != null && columns[name] !== "VARCHAR");
  for (const [name] of Object.entries(rest)) if (/score/.test(name)) take(name);
  if (scores.length) parts.push(element("h3", { textContent: "Scores" }), element("dl", { className: "scores" },
    ...scores.map(([name, value]) => element("div", {}, element("dt", { textContent: name.replaceAll("_", " ") }), element("dd", { textContent: number(value) })))));

  const provenance = take("provenance") || [];
  const [width, height, fps] = [take("width"), take("height"), take("fps")];
  const spans = [take("start_ms"), take("end_ms"), take("duration_ms")];
  const sound = take("has_audio");
  take("frame_ms");
  const facts = [["clip", take("clip_id")], ["video", take("video_id")]];
  const source = take("source_url");
  if (source) facts.push(["source", /^https?:\/\//.test(source)
    ? element("a", { href: source, target: "_blank", rel: "noreferrer noopener", textContent: source }) : source]);
  facts.push(["span", `${clock(spans[0], 3)} to ${clock(spans[1], 3)}, ${number(spans[2] / 1000)} s`]);
  facts.push(["picture", [width && `${width} × ${height}`, fps && `${number(fps)} fps`, sound === false && "no sound"].filter(Boolean).join(", ")]);
  const place = [take("shard"), take("row_group"), take("row")];
  for (const [name, value] of Object.entries(rest)) {
    if (value == null || value.length === 0) continue;
    facts.push([name, typeof value === "object" ? (value.every?.((item) => typeof item !== "object") ? value.join(", ") : JSON.stringify(value)) : String(value)]);
  }
  facts.push(["stored in", `${place[0]}, row group ${place[1]}, row ${place[2]}`]);
  parts.push(element("h3", { textContent: "Facts" }), list(facts));

  if (provenance.length) {
    const names = ["column", "model", "revision", "note", "prompt_hash"].filter((name) => provenance.some((entry) => entry[name]));
    const head = element("tr", {}, ...names.map((name) => element("th", { textContent: name.replaceAll("_", " ") })));
    const body = provenance.map((entry) => element("tr", {}, ...names.map((name) => element("td", {
      textContent: name === "prompt_hash" ? (entry[name] || "").slice(0, 10) : entry[name] ?? "", title: entry[name] ?? "" }))));
    parts.push(element("details", { open: true }, element("summary", { textContent: "Who wrote what" }),
      element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)))));
  }
  $("facts").replaceChildren(...parts);
}

// ------------------------------------------------------------------------------------- subsets

function showSubsets(names) {
  $("subset").replaceChildren(element("option", { value: "", textContent: "all clips" }),
    ...names.map((name) => element("option", { value: name, textContent: `subset ${name}` })));
  $("subset").value = state.filter.subset;
}

function openSave() {
  const { where, text, subset } = state.filter;
  const what = [where && `where ${where}`, text && `captions hold ${text}`].filter(Boolean).join(", ");
  $("save-what").textContent = subset ? "A subset is drawn from the whole corpus: choose “all clips” first." : what || "All clips of the corpus.";
  $("save-go").disabled = Boolean(subset);
  $("save-answer").textContent = "";
  $("save-dialog").showModal();
}

async function save(event) {
  event.preventDefault();
  const [kind, how] = $("save-how").value.split(":");
  const whole = (id) => ($(id).value === "" ? null : Number($(id).value));
  const body = {
    name: $("save-name").value, where: state.filter.where, text: state.filter.text,
    preset: kind === "preset" ? how : "", order: kind === "order" ? how : "", score: $("save-score").value || "clip_score",
    num_clips: whole("save-num"), per_video: whole("save-per-video"), seed: whole("save-seed") ?? 0, replace: $("save-replace").checked,
  };
  const answer = $("save-answer");
  answer.className = "soft";
  answer.textContent = "Drawing…";
  $("save-go").disabled = true;
  try {
    const response = await fetch("/api/subsets", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
    const made = await response.json();
    if (!response.ok) throw made;
    showSubsets(made.subsets);
    answer.className = "";
    answer.replaceChildren(`${several(made.num_clips, "clip")} of ${several(made.num_videos, "video")}, out of ${made.num_candidates.toLocaleString("en")} that pass. `,
      element("code", { textContent: `python -m training RECIPE --data '${state.corpus}#${made.name}'` }));
  } catch (error) {
    answer.className = "wrong";
    answer.textContent = error instanceof Error ? "The viewer does not answer any more" : [error.message, error.hint].filter(Boolean).join(": ");
  }
  $("save-go").disabled = false;
}

// ------------------------------------------------------------------------------------- keys

function columnsOfGrid() {
  return getComputedStyle($("clips")).gridTemplateColumns.split(" ").length;
}

async function move(distance) {
  const target = state.chosen + distance;
  if (target >= state.clips.length && state.next) await turn(true);
  else if (target < 0 && state.chosen >= 0 && state.pages.at(-2) != null) await turn(false, "last");
  else choose(Math.max(0, Math.min(state.clips.length - 1, target)));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const field = event.target.closest("input, textarea, select");
  if (event.key === "Escape") {
    if (field) field.blur();
    else if (!$("detail").hidden) closeClip();
    return;
  }
  if (field) {
    if (event.key === "Enter" && field.id === "where" && !event.shiftKey) {
      event.preventDefault();
      applyFilter();
    }
    return;
  }
  const player = $("player");
  if (event.target === player && [" ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key)) return;
  const actions = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-columnsOfGrid()), ArrowDown: () => move(columnsOfGrid()),
    " ": () => (player.paused ? player.play().catch(() => {}) : player.pause()),
    ",": () => step(-1), ".": () => step(1), n: () => turn(true), p: () => turn(false),
    "/": () => $("where").focus(), s: openSave, "?": () => $("help-dialog").showModal(),
  };
  if (event.key === "Enter" && !event.target.closest("button, a, summary")) actions.Enter = () => choose(Math.max(0, state.chosen), { play: true });
  if (!actions[event.key] || (event.key === " " && event.target.closest("button:not(.clip), summary, a"))) return;
  event.preventDefault();
  actions[event.key]();
}

// ------------------------------------------------------------------------------------- start

async function start() {
  const clip = recall();
  const about = await ask("about", "/api/corpus");
  state.corpus = about.corpus;
  state.columns = about.columns;
  if (!location.hash) state.filter.subset = about.subset;
  $("corpus").textContent = about.corpus.split("/").filter(Boolean).at(-1);
  $("corpus").title = about.corpus;
  document.title = `${$("corpus").textContent} · dataengine view`;
  showSubsets(about.subsets);
  const orders = about.orders.filter((name) => !["clip_id", "video_id", "start_ms", "end_ms", "shard", "row_group", "row"].includes(name));
  $("order").append(...orders.map((name) => element("option", { value: name, textContent: name })));
  const scores = Object.entries(about.columns).filter(([, kind]) => ["FLOAT", "DOUBLE"].includes(kind)).map(([name]) => name);
  $("save-score").append(...scores.map((name) => element("option", { value: name, textContent: name })));
  $("save-score").value = "clip_score";
  $("columns").append(element("div", { className: "chips" }, ...Object.entries(about.columns).map(([name, kind]) => columnChip(name, kind))));
  $("where").value = state.filter.where;
  $("text").value = state.filter.text;
  $("order").value = state.order;
  showDirection();
  fit();
  const known = Boolean(clip);
  await Promise.all([loadPage(known ? "" : "first"), loadCount()]);
  if (known) goTo(clip);
}

function showDirection() {
  $("direction").textContent = state.descending ? "↓" : "↑";
  $("direction").title = state.descending ? "Largest first; turn round" : "Smallest first; turn round";
}

$("filter").addEventListener("submit", (event) => { event.preventDefault(); applyFilter(); });
$("where").addEventListener("input", fit);
$("subset").addEventListener("change", applyFilter);
$("order").addEventListener("change", () => {
  state.descending = /score|^width|^height|^fps/.test($("order").value);
  showDirection();
  applyFilter();
});
$("direction").addEventListener("click", () => { state.descending = !state.descending; showDirection(); applyFilter(); });
$("previous").addEventListener("click", () => turn(false));
$("next").addEventListener("click", () => turn(true));
$("close").addEventListener("click", closeClip);
$("before").addEventListener("click", () => step(-1));
$("behind").addEventListener("click", () => step(1));
$("save").addEventListener("click", openSave);
$("save-form").addEventListener("submit", save);
$("save-cancel").addEventListener("click", () => $("save-dialog").close());
$("show-help").addEventListener("click", () => $("help-dialog").showModal());
$("show-columns").addEventListener("click", () => {
  $("columns").hidden = !$("columns").hidden;
  $("show-columns").setAttribute("aria-expanded", String(!$("columns").hidden));
});
$("player").addEventListener("error", () => {
  if (!$("player").getAttribute("src")) return;
  $("player").hidden = true;
  $("no-video").hidden = false;
  $("no-video").textContent = "No video to play here; these are its frames.";
  $("frames").classList.add("large");
});
document.addEventListener("keydown", onKey);
document.addEventListener("error", (event) => {
  if (event.target.matches?.(".poster img, #frames img")) event.target.hidden = true;
}, true);

start().catch((error) => { if (!aborted(error)) showError(error); });
