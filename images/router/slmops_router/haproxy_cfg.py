"""Routes -> HAProxy's configuration. Pure.

    client -> frontend api --- slot 0..99 ---> backend split | aside ----> frontend in-REV -> backend REV -> pods
              by conversation, else by turn     one "server" per revision,   over a unix socket
                                                its inner frontend

Two levels, because each does one thing that HAProxy cannot do in one: the upper one chooses the revision, exactly, and
moves a request of a failing candidate to the stable revision; the lower one balances over the pods of one revision,
and its counters say how that revision did. The counters of `split` say how the turns were given. What they do not tell
goes through `aside`: conversations, all requests while a revision has no pods and another stands in for it, and what
asks a model nothing (GET, OPTIONS, HEAD: probes, preflights, lists of models), which the stable revision answers, for
it would be evidence of nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from slmops_router.routes import Revision, Routes

BUFFER = 32_768  # bytes; a request that fits can be sent again to another pod or revision
STRIDE = 61  # coprime to 100 and near its golden section: turns spread evenly, and any 100 in a row are exact
PROBE = "/.slmops/ready"
SCOPES = "scope=global&scope=frontend&scope=backend"  # servers are 70 series each, also those without a pod
FRONT = "api"  # the frontend of the clients
SCRAPES = 64  # connections at once that ask for metrics, of these 8 from one address
FILES_SPARE = 256  # for these, and listeners, threads and the like: about 60 with 8 revisions and 4 threads

ERRORS = {
    400: ("invalid_request_error", "bad_request", "The request is not valid HTTP."),
    408: ("invalid_request_error", "request_timeout", "The request did not arrive in time."),
    500: ("server_error", "internal_error", "The router failed."),
    502: ("server_error", "bad_gateway", "The model server ended without an answer. Please try again."),
    503: ("server_error", "not_ready", "No model server is ready. Please try again in a moment."),
    504: ("server_error", "timeout", "The model server did not answer in time."),
}
RETRY_AFTER = 2  # seconds
# between the levels, in the one class of HAProxy's that is no answer:
LATE = 904  # nobody waited, or a 504 says so
REFUSED = 903  # a 503 that says that a client's own time is too short
STALL = 25  # seconds of a client that takes nothing: its server would cut it off after 30, as if that had failed


@dataclass(frozen=True)
class Place:
    """Where things lie and listen on this machine."""

    folder: Path  # sockets, map, state; writable
    port: int = 8000
    metrics_port: int = 9090
    ipv6: bool = False  # listen on IPv6 too: not every machine has it, and HAProxy would not start
    nameservers: tuple[str, ...] = ()  # ip:port
    search: str = ""  # domain put behind a host without dots
    threads: int = 1
    clients: int = 4096  # connections at once, idle ones included; more wait until one ends
    files: int = 1_048_576  # that one process may have open
    reach_seconds: float = 15.0  # for longer, a model without ready pods does not keep its router from being ready
    old_worker_seconds: int = 3600  # how long a reload waits for answers that the old process still gives

    def listen(self, port: int) -> str:
        """All addresses, as `bind` takes them."""
        return f":::{port} v4v6" if self.ipv6 else f":{port}"

    @property
    def slots(self) -> Path:
        """The map from slot to revision."""
        return self.folder / "slots.map"

    @property
    def state(self) -> Path:
        """Addresses and health of the servers, kept over a reload."""
        return self.folder / "servers.state"

    @property
    def socket(self) -> Path:
        """The runtime API."""
        return self.folder / "haproxy.sock"

    @property
    def master(self) -> Path:
        """The same of the process that starts the others."""
        return self.folder / "master.sock"


def fingerprint(routes: Routes) -> str:
    """What tells the configuration of one structure from another's; HAProxy repeats it in `show info`."""
    return hashlib.sha256(repr(routes.structure).encode()).hexdigest()[:12]


def slots_map(routes: Routes) -> str:
    """Content of the map file: slot -> revision, and who stands in for whom."""
    lines = [f"{slot} {revision}" for slot, revision in enumerate(routes.slots())]
    if lines and routes.fallback:
        lines.append(f"fallback {routes.fallback}")
        others = [r for r in routes.revisions if r.revision != routes.fallback and r.weight]
        spares = {r.revision: routes.fallback for r in others}
        if others:
            spares[routes.fallback] = max(others, key=lambda r: r.weight).revision
        lines += [f"spare-of-{revision} {spare}" for revision, spare in spares.items()]
    return "".join(f"{line}\n" for line in lines)


def takes_over(routes: Routes, revision: Revision) -> int:
    """Weight in the upper level: not a share of the requests, but who takes those that another revision failed."""
    return int(revision.revision == routes.fallback and bool(routes.slots()))


def clients(routes: Routes, place: Place) -> int:
    """How many connections of clients there may be.

    Their requests pass the inner sockets, which must never wait for a client to go: nor would the probes that go the
    same way, and all revisions would seem down. So the process may have three times as many: one more for each running
    request, and as many for those that are closing and the requests of processes from before a reload. HAProxy wants
    two files for each and one for each check, and does not start without.
    """
    spare = FILES_SPARE + sum(revision.servers for revision in routes.revisions)
    return max(1, min(place.clients, (place.files - spare) // 6))


def render(routes: Routes, place: Place) -> str:
    """Write the whole configuration."""
    parts = [_head(routes, place), _frontend(routes, place)]
    parts += [_upper(name, routes, place) for name in ("split", "aside")]
    parts += [_lower(revision, routes, place) for revision in routes.revisions]
    return "\n".join(parts)


def _head(routes: Routes, place: Place) -> str:
    servers = "".join(f"    nameserver ns{number} {address}\n" for number, address in enumerate(place.nameservers))
    return f"""\
global
    description {fingerprint(routes)}
    log stdout format raw local0 notice
    maxconn {3 * clients(routes, place) + SCRAPES}
    nbthread {place.threads}
    stats socket {place.socket} mode 600 level admin expose-fd listeners
    server-state-file {place.state}
    hard-stop-after {place.old_worker_seconds}s
    tune.bufsize {BUFFER}
    tune.maxrewrite 1024

defaults
    mode http
    log global
    option dontlog-normal
    option dontlognull
    option abortonclose
    # What ends under a request on a kept connection would be no answer, neither to the client nor in the counts
    option http-server-close
    option idle-close-on-response
    option http-no-delay
    option http-buffer-request
    option redispatch 1
    timeout connect 2s
    timeout check 2s
    timeout queue 10s
    timeout http-request 60s
    timeout http-keep-alive 30s
    timeout client 1h
    timeout server 1h
    load-server-state-from-file global
{_errors()}
resolvers dns
{servers}\
    accepted_payload_size 8192
    resolve_retries 2
    timeout resolve 1s
    timeout retry 1s
    hold valid 1s
    hold obsolete 3s
    hold nx 30s
    hold timeout 1h
    hold refused 1h
    hold other 1h
"""


def _errors() -> str:
    lines = []
    for status, (kind, code, message) in ERRORS.items():
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
        after = f" hdr retry-after {RETRY_AFTER}" if status == 503 else ""
        lines.append(f"    http-error status {status} content-type application/json string '{body}'{after}\n")
    return "".join(lines)


def _frontend(routes: Routes, place: Place) -> str:
    return f"""\
frontend metrics
    bind {place.listen(place.metrics_port)}
    maxconn {SCRAPES}
    option dontlog-normal
    # Nobody who says nothing, or comes from one address, keeps a Prometheus away: without it, rollouts hold
    option httpclose
    timeout http-request 2s
    timeout client 5s
    stick-table type ipv6 size 1k store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc0_conn_cur gt 8 }}
    http-request set-query {SCOPES} if !{{ query -m found }}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request return status 404

frontend {FRONT}
    bind {place.listen(place.port)}
    maxconn {clients(routes, place)}
    timeout client {STALL}s
    http-request return status 404 if {{ path_beg /.slmops/ }}
    acl sticky req.hdr(x-session-id) -m found
    http-request set-var(txn.slot) req.hdr(x-session-id),xxh32,mod(100) if sticky
    http-request set-var(txn.slot) int(0) if !METH_POST
    http-request track-sc0 int(0) table turns if METH_POST !sticky
    http-request set-var(txn.slot) sc0_inc_gpc0(turns),mul({STRIDE}),mod(100) if METH_POST !sticky
    http-request set-var(txn.revision) var(txn.slot),map_str({place.slots})
    http-request set-var(txn.fallback) str(fallback),map_str({place.slots})
    http-request set-var(txn.revision) var(txn.fallback) if !METH_POST
    http-request set-var(txn.spare) str(spare-of-),concat(,txn.revision),map_str({place.slots})
    acl nobody var(txn.revision),nbsrv eq 0
    acl spared var(txn.spare),nbsrv gt 0
    acl spareless var(txn.spare),nbsrv eq 0
    http-request set-var(txn.aside) bool(true) if sticky or nobody or spareless or !METH_POST
    http-request set-var(txn.revision) var(txn.spare) if nobody spared
    acl aside var(txn.aside) -m bool
    use_backend aside if aside
    default_backend split

backend turns
    stick-table type integer size 1 store gpc0
"""


def _upper(name: str, routes: Routes, place: Place) -> str:
    """Choose the revision. Only what a candidate could not answer is asked again, of the fallback.

    What the stable revision could not answer is not: its bad requests would count as the candidate's failures. Nor is
    what came too late for the client, who waits no more, or was refused because it would, though the stable revision
    may be fast enough: what HAProxy asks again by its status it counts by that status, too.
    """
    lines = [
        f"backend {name}",
        "    balance roundrobin",
        "    retries 1",
        "    retry-on conn-failure empty-response response-timeout junk-response 500 502 503 504",
        "    http-request disable-l7-retry if { var(txn.revision),strcmp(txn.fallback) eq 0 }",
        "    use-server %[var(txn.revision)] if { var(txn.revision) -m found }",
        f"    http-response set-status 504 if {{ status {LATE} }}",
        f"    http-response set-status 503 if {{ status {REFUSED} }}",
    ]
    if name == "split":
        lines += [f"    option httpchk GET {PROBE}", "    http-check expect status 200"]
    for revision in routes.revisions:
        how = "check inter 250ms fall 1 rise 1" if name == "split" else f"track split/{revision.revision}"
        where = f"{revision.revision} unix@{_socket(revision, place)}"
        lines.append(f"    server {where} {how} weight {takes_over(routes, revision)}")
    return "\n".join(lines) + "\n"


def _lower(revision: Revision, routes: Routes, place: Place) -> str:
    name = revision.revision
    host = revision.host if "." in revision.host or not place.search else f"{revision.host}.{place.search}"
    return f"""\
frontend in-{name}
    bind unix@{_socket(revision, place)} mode 600
    acl probe path {PROBE}
    http-request return status 200 if probe {{ nbsrv({name}) gt 0 }}
    http-request return status 503 if probe
    default_backend {name}

backend {name}
    balance leastconn
    retries 2
    retry-on conn-failure empty-response 503
    option httpchk GET /readyz
    http-check expect status 200
    http-response set-header x-slmops-revision {name}
    http-response set-status {LATE} if {{ status 504 }} {{ res.hdr(x-should-retry) false }}
    http-response set-status {REFUSED} if {{ status 503 }} {{ res.hdr(x-slmops-deadline) unreachable }}
    # HAProxy's own 400 here: the client left before the answer began
    http-after-response set-status {LATE} if {{ status 400 }} !{{ res.hdr(x-slmops-revision) -m found }}
    default-server check inter 1s fastinter 250ms downinter 500ms fall 2 rise 1
    default-server observe layer4 error-limit 1 on-error mark-down
    server-template pod- {revision.servers} {host}:{routes.port} resolvers dns resolve-prefer ipv4 init-addr last,none
"""


def _socket(revision: Revision, place: Place) -> Path:
    return place.folder / f"{revision.revision}.sock"
