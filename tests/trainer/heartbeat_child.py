"""One rank with a heartbeat, and what becomes of it. Arguments: rank, port of the store, deed, silence."""

import ctypes
import os
import sys
import time
from datetime import timedelta

from torch.distributed import TCPStore

from outrider.trainer.heartbeat import Heartbeat, Hello


def main(rank: int, store_port: int, deed: str, silence: float) -> None:
    store = TCPStore("127.0.0.1", store_port, is_master=False, timeout=timedelta(seconds=30))
    heartbeat = Heartbeat(Hello("token", rank, rank, f"host{rank}"), silence)
    heartbeat.last_words = lambda: print("last words", flush=True)
    if rank == 0:
        store.set("port", str(heartbeat.listen("127.0.0.1")))
    else:
        heartbeat.connect("127.0.0.1", int(store.get("port")))
    store.add("ready", 1)
    while store.add("ready", 0) < 3:
        time.sleep(0.05)
    time.sleep(0.5)
    if deed == "die":
        os.kill(os.getpid(), 9)
    if deed == "fail":
        heartbeat.leave("no memory is left")
        raise SystemExit(2)
    if deed == "leave":
        heartbeat.leave()
        return
    if deed == "compute":  # for longer than the silence, and no other thread of Python runs meanwhile
        ctypes.PyDLL(None).sleep(int(2 * silence))
        heartbeat.leave()
        return
    if deed == "wait":
        time.sleep(30)
    raise SystemExit(3)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
