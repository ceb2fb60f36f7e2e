// On paper: the step that is looked at, its pictures whole, its text, and the ledger.
const printing = (() => {
  "use strict";

  function prepare() {
    page.drawAll();
    ledger.clear();
    camera.whole(true);
  }

  function start() {
    window.addEventListener("beforeprint", prepare);
    window.addEventListener("afterprint", () => camera.whole(false));
  }

  return { start };
})();
