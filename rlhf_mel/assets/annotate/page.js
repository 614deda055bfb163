// Keys, one clip at a time, the line that follows the sound, and the seconds of each clip that were played.
(() => {
  const audio = (side) => document.querySelector(`#pair [data-clip="${side}"] audio`);
  const press = (id) => document.getElementById(id)?.click();
  const toggle = (side) => {
    const player = audio(side);
    if (!player) return;
    if (!player.paused) return player.pause();
    player.currentTime = 0;
    player.play();
  };
  const actions = {
    1: () => toggle("left"),
    2: () => toggle("right"),
    3: () => toggle("reference"),
    a: () => press("answer-left"),
    b: () => press("answer-right"),
    t: () => press("answer-tie"),
    x: () => press("answer-both_bad"),
    u: () => press("undo"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    const action = actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  });

  const follow = (player) => {
    const line = player.closest("[data-clip]")?.querySelector(".cursor");
    if (!line || !player.duration) return;
    line.style.left = `${(100 * player.currentTime) / player.duration}%`;
    if (!player.paused) requestAnimationFrame(() => follow(player));
  };
  // Events of media do not bubble; they are seen on their way down.
  document.addEventListener("play", (event) => {
    for (const other of document.querySelectorAll("#pair audio")) if (other !== event.target) other.pause();
    follow(event.target);
  }, true);
  document.addEventListener("seeked", (event) => follow(event.target), true);
  document.addEventListener("click", (event) => {
    const span = event.target.closest?.("#pair .span");
    const player = span?.closest("[data-clip]").querySelector("audio");
    if (!player?.duration) return;
    const box = span.getBoundingClientRect();
    player.currentTime = (player.duration * (event.clientX - box.left)) / box.width;
    player.play();
  });

  const seconds = (side) => {
    const played = audio(side)?.played;
    return Array.from({ length: played?.length ?? 0 }, (_, i) => played.end(i) - played.start(i)).reduce((a, b) => a + b, 0);
  };
  window.secondsPlayed = () => [seconds("left"), seconds("right")];
})();
