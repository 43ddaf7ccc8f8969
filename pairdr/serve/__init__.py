"""Search over HTTP, and a page, on top of a work folder or of vectors: `pairdr serve`.

| module | what it knows |
|---|---|
| `failures` | every error in one JSON form |
| `forms` | what is asked and answered |
| `batching` | work of many requests, done together |
| `sharing` | one encoder for everybody, in turns |
| `shelf` | the models that are served, each as one version of its parts; newly published ones are picked up |
| `computing` | what a batch computes in its thread |
| `service` | questions, texts and passages to answers, through the batches |
| `measuring` | Prometheus |
| `guard` | what a request may be before anybody reads it: host, key, size, time |
| `labels` | what people say of results and of audited labels, written down |
| `app` | the paths |
| `wire` | what comes before anything is a request |
| `run` | the server: socket, signals, draining |
"""
