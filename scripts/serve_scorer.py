"""Hold a scorer in a process of its own and answer over HTTP; a run asks it as the scorer "remote"."""

import argparse
import sys


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--scorer", required=True, help="its name, such as hpsv3; docs/rewards.md lists them")
    add("--weights", help="local folder or .safetensors file")
    add("--clip", help="open_clip weights under the aesthetic head")
    add("--model", help="open_clip architecture of a bare .safetensors file")
    add("--frames", type=float, help="judge clips with a picture scorer: mean over this share of the best frames")
    add("--port", type=int, default=8800)
    add("--host", default="127.0.0.1", help="another interface is open to everyone who reaches it: no password")
    add("--device", default="cpu", help="cpu or cuda")
    add("--chunk", type=int, help="samples that are scored at once; None: a whole request")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from fewstep.dmd.reward.scorers import ScorerChoice, make_scorer
    from fewstep.evaluation.scorers.remote_server import ScorerServer

    place = {"host": options.host, "device": options.device, "chunk": options.chunk}
    try:
        choice = ScorerChoice(options.scorer, options.weights, options.clip, options.model, options.frames)
        server = ScorerServer(make_scorer(choice, device=options.device), options.port, **place)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.scorer} answers at http://{options.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
