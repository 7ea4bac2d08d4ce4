// What the page does by itself: it shows how jobs go, the pictures, and the brush.
// The server says everything anew at /live/state, so a reload or a lost connection loses nothing.
window.ldm = (() => {
  const by = (id) => document.getElementById(id);
  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const address = (name) => "live/picture/" + name;
  let state = {version: "", jobs: [], pictures: []};
  let chosen = "";        // name of the picture that the buttons are about
  let known = null;       // number of the newest job that has begun
  let followed = 0;       // number of the job whose pictures are shown as they come
  let announced = "";

  // --- jobs ---------------------------------------------------------------------------------

  const current = () =>
    state.jobs.find((job) => job.state === "running") ||
    state.jobs.filter((job) => job.state !== "waiting").pop();

  const showJob = (job) => {
    const live = by("live");
    const parts = [];
    if (job && job.state === "running") {
      parts.push(make("p", job.text || "Starting"));
      const bar = make("progress");
      bar.value = job.share;
      bar.setAttribute("aria-label", "Progress");
      parts.push(bar);
    }
    if (job) {
      parts.push(make("p", "Seed " + job.seed));
      for (const line of job.lines) parts.push(make("p", line.text, line.kind));
    }
    live.replaceChildren(...parts);
  };

  const showWaiting = () => {
    const waiting = state.jobs.filter((job) => job.state === "waiting");
    const list = make("ol");
    for (const job of waiting) {
      const item = make("li");
      item.append(make("span", `${job.place} in line: ${job.title} (seed ${job.seed})`));
      const cancel = make("button", "Cancel");
      cancel.type = "button";
      cancel.setAttribute("aria-label", `Cancel number ${job.place} in line`);
      cancel.onclick = () => post("stop/" + job.number);
      item.append(cancel);
      list.append(item);
    }
    const title = make("p", `${waiting.length} waiting`);
    by("waiting").replaceChildren(...(waiting.length ? [title, list] : []));
  };

  // Said to screen readers: what happens to jobs, not every step.
  const announce = (job) => {
    if (!job) return;
    const count = job.pictures.length;
    const error = job.lines.filter((line) => line.kind === "error").map((line) => line.text);
    const text = {
      running: count ? `${count} of ${job.n_pictures} pictures are finished` : "Drawing",
      done: `Finished: ${count} pictures`, stopped: "Stopped", failed: error.join(" "),
    }[job.state];
    if (`${job.number} ${text}` !== announced) by("announce").textContent = text;
    announced = `${job.number} ${text}`;
  };

  // --- pictures -----------------------------------------------------------------------------

  const picture = (source, text) => {
    const image = make("img");
    image.src = source;
    image.alt = text;
    image.onload = () => {  // small ones are enlarged by whole steps, their pixels crisp
      const room = Math.min(512, by("view").parentElement.clientWidth || 512);
      const factor = Math.floor(room / image.naturalWidth);
      if (factor > 1) {
        image.classList.add("crisp");
        image.style.width = factor * image.naturalWidth + "px";
      }
    };
    return image;
  };

  const showPicture = (source, text) => {
    const view = by("view"), wipe = by("wipe");
    wipe.hidden = true;
    view.hidden = false;
    const old = view.querySelector("img");
    if (old && old.dataset.source === source) return;
    const image = picture(source, text);
    image.dataset.source = source;
    view.replaceChildren(image, make("figcaption", text));
  };

  const showPair = (one, other) => {
    const wipe = by("wipe");
    by("view").hidden = true;
    wipe.hidden = false;
    if (wipe.dataset.pair === one + other) return;
    wipe.dataset.pair = one + other;
    const below = picture(address(other), "unmerged"), over = picture(address(one), "merged");
    over.className = "over";
    const slide = make("input");
    slide.type = "range";
    slide.setAttribute("aria-label", "How much is seen of the merged picture");
    const move = () => { over.style.clipPath = `inset(0 ${100 - slide.value}% 0 0)`; };
    slide.oninput = move;
    slide.value = 50;
    move();
    const names = make("p");
    names.append(make("span", "merged"), make("span", "unmerged"));
    wipe.replaceChildren(below, over, slide, names);
  };

  const showNewest = (job) => {
    if (!job || job.number !== followed) return;
    const names = job.pictures.map((one) => one.name);
    if (job.state === "running" && job.preview) {
      showPicture(`live/preview/${job.number}?n=${job.preview}`, "Preview of the picture");
    } else if (names.length) {
      const last = names[names.length - 1];
      if (chosen !== last) choose(last, false);
      if (job.is_pair && job.pictures.some((one) => one.label === "unmerged")) {
        const first = (label) => job.pictures.find((one) => one.label === label).name;
        showPair(first("merged"), first("unmerged"));
      } else showPicture(address(last), last);
    }
  };

  const showGallery = () => {
    const gallery = by("gallery");
    const wanted = state.pictures.join(" ");
    if (gallery.dataset.names !== wanted) {
      gallery.dataset.names = wanted;
      const old = new Map([...gallery.children].map((node) => [node.dataset.name, node]));
      gallery.replaceChildren(...state.pictures.map((name) => old.get(name) || small(name)));
    }
    if (!chosen && state.pictures.length) choose(state.pictures[0], !followed);
    for (const node of gallery.children)
      node.classList.toggle("chosen", node.dataset.name === chosen);
  };

  const small = (name) => {
    const button = make("button");
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("role", "listitem");
    button.setAttribute("aria-label", `Picture ${name}`);
    const image = make("img");
    image.loading = "lazy";
    image.alt = "";
    image.src = address(name);
    button.append(image);
    button.onclick = () => { followed = 0; choose(name, true); showGallery(); };
    return button;
  };

  const choose = async (name, isShown) => {
    chosen = name;
    if (isShown) showPicture(address(name), name);
    const answer = await fetch("live/about/" + name).catch(() => null);
    const about = answer && answer.ok ? await answer.json() : {};
    if (chosen !== name) return;
    const rows = Object.entries(about).flatMap(([key, value]) => [
      make("dt", key), make("dd", typeof value === "string" ? value : JSON.stringify(value)),
    ]);
    by("about").replaceChildren(...rows);
    by("details").hidden = !rows.length;
  };

  const deleteChosen = async () => {
    if (!chosen || !confirm(`Delete ${chosen} for good?`)) return;
    const next = state.pictures[state.pictures.indexOf(chosen) + 1] || "";
    await fetch(address(chosen), {method: "DELETE"});
    followed = 0;
    chosen = "";
    by("view").replaceChildren();
    by("details").hidden = true;
    if (next) choose(next, true);
  };

  // --- asking -------------------------------------------------------------------------------

  const post = async (what) => { await fetch("live/" + what, {method: "POST"}); };
  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  const show = () => {
    const job = current();
    if (job && (known === null || job.number > known)) {
      if (known !== null || job.state === "running" || !state.pictures.length)
        followed = job.number;
      known = job.number;
    }
    known = known || 0;
    showJob(job);
    showWaiting();
    announce(job);
    showNewest(job);
    showGallery();
  };

  const watch = async () => {
    while (!(by("live") && by("gallery") && by("view"))) await pause(0.1);
    for (;;) {
      try {
        const answer = await fetch("live/state?since=" + state.version);
        if (!answer.ok) throw new Error(answer.statusText);
        state = await answer.json();
        show();
        await pause(0.1);
      } catch (error) {
        by("live").replaceChildren(make("p", "The server does not answer; trying again", "lost"));
        state.version = "";
        await pause(1);
      }
    }
  };

  // --- the brush ----------------------------------------------------------------------------

  const RED = "#ff2d55";
  let painted = null;  // the canvas of the mask; it outlives a change of tabs
  const size = () => Number(by("brush-size").value);

  const brushOn = (file) => {
    const box = by("brush");
    if (!box) return;
    if (!file || !file.url) { box.hidden = true; return; }
    const image = new Image();
    image.onload = () => {
      const scale = Math.min(1, 2048 / Math.max(image.width, image.height));
      const back = by("brush-picture"), front = by("brush-mask");
      for (const canvas of [back, front]) {
        canvas.width = Math.round(scale * image.width);
        canvas.height = Math.round(scale * image.height);
      }
      const zoom = Math.max(1, Math.floor(420 / back.width));
      box.style.width = zoom * back.width + "px";
      back.style.width = "100%";
      back.classList.toggle("crisp", zoom > 1);
      back.getContext("2d").drawImage(image, 0, 0, back.width, back.height);
      box.hidden = false;
      painted = front;
      connectBrush(front);
    };
    image.src = file.url;
  };

  const connectBrush = (canvas) => {
    if (canvas.dataset.ready) return;
    canvas.dataset.ready = "yes";
    const context = () => canvas.getContext("2d");
    let last = null;
    const place = (event) => {
      const frame = canvas.getBoundingClientRect();
      return [(event.clientX - frame.left) * canvas.width / frame.width,
              (event.clientY - frame.top) * canvas.height / frame.height];
    };
    const stroke = (event) => {
      const here = place(event), draw = context();
      const frame = canvas.getBoundingClientRect();
      draw.globalCompositeOperation = by("brush-erases").checked ? "destination-out" : "source-over";
      draw.strokeStyle = RED;
      draw.lineWidth = Math.max(1, size() * canvas.width / frame.width);
      draw.lineCap = draw.lineJoin = "round";
      draw.beginPath();
      draw.moveTo(...(last || here));
      draw.lineTo(...here);
      draw.stroke();
      last = here;
    };
    canvas.onpointerdown = (event) => { last = null; canvas.setPointerCapture(event.pointerId);
      stroke(event); };
    canvas.onpointermove = (event) => { if (event.buttons) stroke(event); };
    canvas.onpointerup = () => { last = null; };
    const clear = () => context().clearRect(0, 0, canvas.width, canvas.height);
    const invert = () => {
      const draw = context();
      draw.globalCompositeOperation = "xor";
      draw.fillStyle = RED;
      draw.fillRect(0, 0, canvas.width, canvas.height);
    };
    by("brush-clear").onclick = clear;
    by("brush-invert").onclick = invert;
    canvas.onkeydown = (event) => {
      if (event.key === "c") clear();
      if (event.key === "e") by("brush-erases").click();
    };
  };

  // White where it was brushed, a PNG as a data URL; empty where nothing was.
  const mask = (what) => {
    if (what !== "inpaint" || !painted) return "";
    const pixels = painted.getContext("2d").getImageData(0, 0, painted.width, painted.height);
    let any = false;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const value = pixels.data[i + 3] > 127 ? 255 : 0;
      any = any || value > 0;
      pixels.data.fill(value, i, i + 3);
      pixels.data[i + 3] = 255;
    }
    const copy = make("canvas");
    copy.width = painted.width;
    copy.height = painted.height;
    copy.getContext("2d").putImageData(pixels, 0, 0);
    return any ? copy.toDataURL("image/png") : "";
  };

  // --- the form -----------------------------------------------------------------------------

  const added = (prompt, word) => (word && prompt ? prompt + ", " + word : prompt || word || "");
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      // a field tells of its value when it is left
      if (document.activeElement) document.activeElement.dispatchEvent(new Event("blur"));
      setTimeout(() => by("draw").click(), 50);
    }
  });
  // on a phone the picture is far below the button
  document.addEventListener("click", (event) => {
    if (innerWidth <= 640 && event.target.closest && event.target.closest("#draw"))
      by("status").scrollIntoView({behavior: "smooth"});
  });
  // Nothing can be typed before the form has what the browser kept, which would take its place.
  document.documentElement.inert = true;
  const filled = () => { document.documentElement.inert = false; };
  watch();

  return {
    post, filled, brushOn, mask, deleteChosen,
    chosen: () => chosen,
    newest: () => known || 0,
    lastSeed: () => { const job = current(); return job ? Number(job.seed) : -1; },
    withLora: (prompt, name, weight) =>
      name ? added(prompt, `<lora:${name}:${Number(weight) || 1}>`) : prompt,
    withWord: (prompt, word) => added(prompt, word),
  };
})();
