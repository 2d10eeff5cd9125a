// Keeps a view up to date. Everything works without it, by loading the page again.
"use strict";

// A button that was pressed is not pressed twice; the coordinator would do it once anyway.
let sent = false;
document.addEventListener("submit", (event) => {
    if (sent) { event.preventDefault(); return; }
    sent = true;
    for (const button of document.querySelectorAll("button")) button.setAttribute("aria-busy", "true");
});
// A page that comes out of the browser's memory has old buttons.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

// Whoever has a button pressed down has not let go of it: a part that is replaced meanwhile would swallow the press.
let held = false;
addEventListener("pointerdown", () => { held = true; }, true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(() => { held = false; }), true);

// What a part shows, without what is new each time it is made.
function content(part) {
    const copy = part.cloneNode(true);
    for (const input of copy.querySelectorAll("input[type=hidden]")) input.remove();
    return copy.outerHTML;
}

function say(text) {
    let line = document.getElementById("stale");
    if (!line) {
        if (!text) return;
        line = document.createElement("p");
        line.id = "stale";
        line.className = "wrong stale";
        line.setAttribute("role", "status");
        document.querySelector("main").append(line);
    }
    if (text) line.textContent = text; else line.remove();
}

async function renew() {
    const part = document.getElementById("live");
    try {
        const answer = await fetch(location.href, { headers: { "accept": "text/html" } });
        if (answer.redirected || answer.status === 401) { location.reload(); return; }
        if (!answer.ok) throw new Error(answer.statusText);
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
        say("");
        if (held) { clearTimeout(soon); soon = setTimeout(keep, 150); return; }
        if (sent || !fresh || content(fresh) === content(part)) return;
        const focused = document.activeElement && part.contains(document.activeElement) && document.activeElement.id;
        part.replaceWith(document.adoptNode(fresh));
        if (focused) { const again = document.getElementById(focused); if (again) again.focus(); }
    } catch (error) {
        say("The coordinator does not answer: what you see may be old. It is asked again.");
    }
}

let timer = 0;
async function keep() {
    clearTimeout(timer);
    if (!document.hidden && !sent) await renew();
    const part = document.getElementById("live");
    clearTimeout(timer);
    if (part) timer = setTimeout(keep, Number(part.dataset.every));
}

// The log of a build, from where the page ended on.
async function follow(log) {
    const text = new TextDecoder();
    let offset = Number(log.dataset.offset);
    for (;;) {
        // Looked at before the log is asked for: what has ended says no more.
        const ended = document.querySelector("#state[data-ended]");
        let length = 0;
        try {
            const answer = await fetch(`${log.dataset.log}?offset=${offset}`);
            if (answer.ok) {
                const bytes = await answer.arrayBuffer();
                length = bytes.byteLength;
                offset += length;
                const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
                log.append(text.decode(bytes, { stream: true }));
                if (length && below) log.scrollTop = log.scrollHeight;
            }
            if (ended && answer.ok && !length) return;
        } catch (error) { /* The view itself says that nobody answers. */ }
        if (!length) await new Promise((next) => setTimeout(next, document.hidden ? 5000 : 700));
    }
}

// Something happened: the view is looked at at once, and no more often than it can be made.
let stream = null;
let soon = 0;
function listen() {
    const part = document.getElementById("live");
    if (stream || !part || document.hidden) return;
    stream = new EventSource(part.dataset.events);
    const look = () => { clearTimeout(soon); soon = setTimeout(keep, 150); };
    for (const kind of part.dataset.kinds.split(" ")) stream.addEventListener(kind, look);
}
// A page that nobody looks at holds no stream open.
function deaf() { if (stream) stream.close(); stream = null; }

const part = document.getElementById("live");
if (part) timer = setTimeout(keep, Number(part.dataset.every));
document.addEventListener("visibilitychange", () => {
    if (document.hidden) { deaf(); return; }
    listen();
    if (document.getElementById("live")) keep();
});
addEventListener("pagehide", deaf);
listen();
const log = document.getElementById("log");
if (log) { log.scrollTop = log.scrollHeight; follow(log); }
