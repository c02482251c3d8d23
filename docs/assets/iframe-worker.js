// The search runs in a worker, which browsers refuse to pages opened from file://. There a hidden frame does its work.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const worker = this.frame.contentWindow
      worker.postMessage = (data) => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const load = (address) => new Promise((done, failed) => {
        const script = worker.document.createElement("script")
        script.src = address
        script.onload = done
        script.onerror = failed
        worker.document.body.appendChild(script)
      })
      worker.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve())
      this.loaded = load(new URL(url, location.href).href)
    }
    postMessage(data) {
      this.loaded.then(() => {
        const worker = this.frame.contentWindow
        worker.dispatchEvent(new worker.MessageEvent("message", { data }))
      })
    }
    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
