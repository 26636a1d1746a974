"""A run's check before it starts: one process, no weights, no GPUs, for any number of ranks.

python -m spmd.preflight topology=pp4 model.path=DIR input=in.jsonl output=out.jsonl

What isn't given isn't checked. It ends at the first thing that would end the run, with the same message.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from spmd.api.prompts import BEGUN_TWICE
from spmd.api.reader import Reader
from spmd.api.rows import BadRow, RowParser
from spmd.api.tokenizer import load_generation_config, load_tokenizer
from spmd.config import Config
from spmd.config_checks import check, warnings
from spmd.formats.content import is_plain, roles_in
from spmd.formats.sources import find_sources
from spmd.formats.spool import sample
from spmd.formats.table_output import answers_of, check_table
from spmd.journal.paths import Paths, check_errors, shard_output
from spmd.messages import first_line, readable
from spmd.model.checkpoint import check_files
from spmd.report.progress import estimate_rows
from spmd.run_files import RunFiles, columns_of
from spmd.runtime.compose import compose, tell
from spmd.settings import Settings, read_model, resolve
from spmd.signals import USAGE
from spmd.stage.memory import (
    CUDA_BYTES,
    Device,
    blocks_that_fit,
    check_memory,
    least_blocks,
    machine_bytes,
    most_blocks,
    needs,
)
from spmd.topology import Topology

SAMPLE_ROWS, SAMPLE_BYTES = 2000, 16 * 2**20  # of the input, whichever is less
SHOWN = 3  # bad rows that are told one by one


def main() -> None:
    """Print what is well; the first thing that isn't becomes one line, and exit status 2."""
    try:
        for name, (first, *more) in preflight(compose()):
            print(f"ok  {name:<11} {first}", *more, sep=f"\n{'':16}", flush=True)
    except (ValueError, OSError) as error:
        tell(ValueError(error))
        sys.exit(USAGE)


def preflight(config: Config) -> Iterator[tuple[str, list[str]]]:
    """What was checked, step by step, and what there is to say of it, at least one line.

    Raises:
        ValueError: what the user can mend.
    """
    t = config.topology
    check(config, t.dp * t.pp * t.tp)
    device = smallest_device(config)
    settings = resolve(config, read_model(config), torch.device(device.kind if device else "cuda"))
    yield "config", _config(settings)
    yield "model", [_model(settings)]
    yield "checkpoint", _checkpoint(settings)
    yield "memory", _memory(settings, device)
    parser = _parser(settings, _capacity(settings, device) if device else settings.model.max_model_len)
    yield "tokenizer", [_tokenizer(parser)]
    if config.input is not None:
        yield "input", _input(config, parser)
    if config.output is not None:
        yield "output", [_output(shard_output(config.output, config.shard), settings)]
        if config.errors is not None:
            yield "errors", [_errors(shard_output(config.errors, config.shard), config)]
    yield "logs", [_logs(config)]


def _parser(settings: Settings, capacity: int) -> RowParser:
    m = settings.model
    return RowParser(
        load_tokenizer(m.tokenizer, m.revision),
        load_generation_config(m.path, m.revision),
        settings.sampling,
        m.max_model_len,
        capacity,
        settings.arch.vocab_size,
    )


def smallest_device(config: Config) -> Device | None:
    """The smallest device that a rank will have; None for GPUs of which nothing is known."""
    gib = config.preflight.device_memory
    if gib is not None and gib <= 0:
        raise ValueError(f"preflight.device_memory={gib} must be more than 0, in GiB")
    here = torch.cuda.is_available()
    if config.device == "cpu" or not (gib or here or config.device == "cuda"):
        t = config.topology
        return Device("cpu", machine_bytes() // (t.dp * t.pp * t.tp), place="if all ranks run on this machine")
    if gib:
        return Device("cuda", int(gib * 2**30), CUDA_BYTES, f"preflight.device_memory={gib:g}")
    if not here:
        return None
    total = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
    return Device("cuda", total, CUDA_BYTES, "this machine's")


def _config(settings: Settings) -> list[str]:
    t, s = settings.topology, settings.scheduler
    return [
        f"processes: {t.dp * t.pp * t.tp} (dp {t.dp} x pp {t.pp} x tp {t.tp}), device: {settings.kind}",
        f"{settings.decode_rows} decode rows a micro-batch, padded to {', '.join(map(str, sorted(s.decode_buckets)))}; "
        f"{s.max_num_batched_tokens:,} tokens a plan",
        *(f"warning: {warning}" for warning in warnings(settings)),
    ]


def _model(settings: Settings) -> str:
    arch, m = settings.arch, settings.model
    return f"{arch.family}, {arch.num_layers} layers, {m.dtype}, requests of up to {m.max_model_len:,} tokens"


def _checkpoint(settings: Settings) -> list[str]:
    m = settings.model
    checkpoint = check_files(settings.arch, m.path, m.load_format, m.revision, settings.stages)
    if checkpoint is None:
        return ["none: random weights (model.load_format=dummy)"]
    return [f"{m.path}: tensors: {len(checkpoint.files):,}, files: {len(set(checkpoint.files.values())):,}"]


def _memory(settings: Settings, device: Device | None) -> list[str]:
    """What the devices have, and a table of what each rank of a stage needs."""
    lines = ["no GPU is here and preflight.device_memory (GiB) isn't set: there is nothing to compare with"]
    if device:
        cautions = check_memory(settings, [device] * settings.topology.pp)
        lines = [f"{readable(device.total)} for each rank ({device.place}), {_cached(settings, device)}"]
        lines += [f"warning: {caution}" for caution in cautions]
    least, most = least_blocks(settings), most_blocks(settings)
    rows = [["stage", "layers", "weights", "KV cache: least", "all seats", "activations"]]
    for stage in needs(settings):
        counts = (stage.weights, least * stage.block, most * stage.block, stage.activations)
        rows.append([str(stage.stage), f"{stage.layers[0]}-{stage.layers[-1]}", *map(readable, counts)])
    return lines + _columns(rows)


def _cached(settings: Settings, device: Device) -> str:
    tokens, longest = _capacity(settings, device), settings.model.max_model_len
    return f"of which the KV cache gets {tokens:,} tokens a replica, {tokens / longest:.1f} requests of {longest:,}"


def _capacity(settings: Settings, device: Device) -> int:
    return settings.sized(blocks_that_fit(settings, [device] * settings.topology.pp)).capacity


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _tokenizer(parser: RowParser) -> str:
    tokenizer = parser.tokenizer
    if tokenizer is None:
        return "none: prompts must be token ids"
    chat = "with" if tokenizer.chat_template else "no"
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, {chat} chat template"


def _inputs(config: Config) -> list[str]:
    """The files that are meant."""
    return [source.path for source in find_sources(config.input)] if config.input is not None else []


def _input(config: Config, parser: RowParser) -> list[str]:
    """The first rows, read as a run would.

    Raises:
        ValueError: the input can't be read, or none of them can be answered.
    """
    sources = find_sources(config.input)
    name = sources[0].path if len(sources) == 1 else f"{len(sources):,} files"
    columns = columns_of(config)
    roles = [str(each) for each in roles_in(sources, columns)[:1]]
    if sources[0].streamed:
        return [f"{name}: not looked at, for it can be read only once"]
    if len(sources) == 1 and is_plain(sources[0]):
        return _rows(name, Reader(name, parser, shard=config.shard), parser)
    with tempfile.NamedTemporaryFile() as file:
        size = file.write(sample(sources, columns, SAMPLE_BYTES))
        file.flush()
        told, *more = _rows(name, Reader(file.name, parser, shard=config.shard), parser)
    return [f"{told}; there may be more, this is of a beginning" if size > SAMPLE_BYTES // 2 else told, *roles, *more]


def _rows(path: str, reader: Reader, parser: RowParser) -> list[str]:
    good = 0
    bad: list[str] = []
    while good + len(bad) < SAMPLE_ROWS and reader.consumed < min(SAMPLE_BYTES, reader.size):
        row = reader.next_row(True)
        if isinstance(row, BadRow):
            bad.append(f"row {row.index} ({row.custom_id}): {row.message}")
        elif row is None:
            break
        else:
            good += 1
    if bad and not good:
        raise ValueError(f"input={path}: none of its first {len(bad):,} rows can be answered; {bad[0]}")
    about = estimate_rows(reader.rows, reader.consumed, reader.size) or 0
    rows = f"{about:,} rows" if reader.consumed >= reader.size else f"about {about:,} rows"
    warnings = [f"warning: {BEGUN_TWICE.format(parser.begun_twice)}"] if parser.begun_twice else []
    told = f"{path}: {rows}, {readable(reader.size)}; of the first {good + len(bad):,} {len(bad):,} will be error lines"
    return [told, *bad[:SHOWN], *warnings]


def _output(output: str, settings: Settings) -> str:
    paths, inputs, t = Paths.of(answers_of(output)), _inputs(settings), settings.topology
    if answers_of(output) != output:
        check_table(output, inputs, settings.errors, settings.resume == "fresh")
    if paths.output.exists() and not paths.output.is_file():
        raise ValueError(f"output={output} is {'a directory' if paths.output.is_dir() else 'no regular file'}")
    if paths.output in (Path(input).resolve() for input in inputs):
        raise ValueError(f"output={output} is the input: it would be overwritten")
    if inputs:
        RunFiles(settings, Topology(t.dp, t.pp, t.tp)).check_output()
    free = _writable(paths.output.parent, f"output={output}")
    earlier = "; answers of an earlier run are there" if paths.folder.exists() or paths.output.exists() else ""
    return f"{output}: {readable(free)} free{earlier}"


def _errors(errors: str, config: Config) -> str:
    assert config.output is not None
    path = check_errors(errors, Paths.of(answers_of(shard_output(config.output, config.shard))), _inputs(config))
    return f"{errors}: {readable(_writable(path.parent, f'errors={errors}'))} free"


def _logs(config: Config) -> str:
    run_dir = config.run_dir or "runs/<SLURM job id, or start time and process>"
    _writable(Path(config.run_dir or "runs").resolve(), f"run_dir={config.run_dir or 'runs'}")
    return f"{run_dir}/logs/rank-<n>.log"


def _writable(folder: Path, name: str) -> int:
    """Bytes that are free where a folder is or will be made.

    Raises:
        ValueError: it can't be written to.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return shutil.disk_usage(there).free
    except OSError as error:
        raise ValueError(f"{name} can't be written: {there}: {error.strerror or first_line(error)}") from error


if __name__ == "__main__":
    main()
