"""What the cache saves, whether cost and memory stay flat, and how soon frames are there, as in assets/benchmarks."""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="exported student, beside the random Wan")
    parser.add_argument("--prefix_chunks", type=int, default=24, help="length of the video made with and without cache")
    parser.add_argument("--repeats", type=int, default=3, help="of each chunk of it; medians are kept")
    parser.add_argument("--memory_chunks", type=int, default=1000, help="length of the stream whose memory is watched")
    parser.add_argument("--speed_chunks", type=int, default=20, help="length of the streams that are timed")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--output", default="assets/benchmarks/streaming.json")
    options = parser.parse_args()

    import torch
    from studies import streaming_speed as benchmark

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        systems = [benchmark.random_system(), *map(benchmark.pipeline_system, options.model)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    records = []
    for system in systems:
        record = benchmark.streaming_record(
            system,
            prefix_chunks=options.prefix_chunks,
            repeats=options.repeats,
            memory_chunks=options.memory_chunks,
            speed_chunks=options.speed_chunks,
        )
        records.append(record)
        prefix = record.prefix
        print(f"{record.system}: {record.decoded.text()}")
        print(
            f"  last of {options.prefix_chunks} chunks: {prefix.ratio_last:.1f} times as long without a cache; growth "
            f"{prefix.growth_window:.2f} with a window, {prefix.growth_recomputed:.2f} without a cache"
        )
    print(benchmark.write_streaming(records, options.output, command=sys.argv))


if __name__ == "__main__":
    main()
