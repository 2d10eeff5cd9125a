"""One peer of a BitTorrent swarm by libtorrent, for the benchmark `peers`.

It says `ready`, a seed once it has checked its file; at a line `go` a leecher adds the torrent, and says `done` when it has every
piece, verified, and written to the file: pieces are verified before that. At a line `uploaded` it says how many bytes of pieces it
has sent. It ends with its standard input.
"""

import argparse
import sys
import threading

import libtorrent as lt

# Plain TCP, as many uploads at once as there are peers, and nothing that looks for others than the tracker's.
SETTINGS = {
    "alert_mask": lt.alert.category_t.status_notification
    | lt.alert.category_t.storage_notification
    | lt.alert.category_t.error_notification,
    "allow_multiple_connections_per_ip": True,
    "connection_speed": 200,
    "enable_dht": False,
    "enable_incoming_utp": False,
    "enable_lsd": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_upnp": False,
    "in_enc_policy": lt.enc_policy.pe_disabled,
    "out_enc_policy": lt.enc_policy.pe_disabled,
    "smooth_connects": False,
    "unchoke_slots_limit": 50,
}

# How long it sleeps between looks at its alerts when there are none, in milliseconds.
ALERTS_EVERY_MS = 1000


def say(line):
    print(line, flush=True)


def add(session, args):
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(args.torrent)
    params.save_path = args.dir
    params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    return session.add_torrent(params)


def tell_finished(session, word):
    """Waits until the torrent's file is whole, and says so once; runs until the process ends."""
    finished = False
    while True:
        session.wait_for_alert(ALERTS_EVERY_MS)
        for alert in session.pop_alerts():
            if isinstance(alert, lt.torrent_finished_alert):
                finished = True
                alert.handle.flush_cache()
            elif isinstance(alert, lt.cache_flushed_alert) and finished and word:
                say(word)
                word = None
            elif alert.category() & lt.alert.category_t.error_notification:
                print(alert.message(), file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--torrent", required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--seed", action="store_true")
    args = parser.parse_args()
    session = lt.session(SETTINGS | {"listen_interfaces": args.listen})
    word = "ready" if args.seed else "done"
    threading.Thread(target=tell_finished, args=(session, word), daemon=True).start()
    handle = None
    if args.seed:
        handle = add(session, args)
    else:
        say("ready")
    for line in sys.stdin:
        if line.strip() == "go":
            handle = add(session, args)
        elif line.strip() == "uploaded":
            say(handle.status().total_payload_upload)


main()
