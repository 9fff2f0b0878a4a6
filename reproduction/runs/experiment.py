"""One experiment: a method, and others beside it, trained and tested on the same tasks."""

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol, TypeAlias

import torch
from rich.console import Console
from torch import Tensor, nn

from reproduction.method.compiled import CompiledMetaGradient
from reproduction.method.episodes import Episodes, Params
from reproduction.method.head import SOLVED_RESIDUAL, STRENGTH, HeadLearner, split_head
from reproduction.method.head_newton import OutputLoss
from reproduction.method.learner import Learner
from reproduction.method.meta import MetaLearner
from reproduction.method.recorded import MetaGradient, RecordedMetaGradient
from reproduction.method.systems import Method, build_inner_solver, build_linear_solver
from reproduction.runs.allocator import keep_freed_memory
from reproduction.runs.checkpoint import Checkpoint
from reproduction.runs.checkpoint_series import CheckpointSeries
from reproduction.runs.clock import clock_for
from reproduction.runs.command_line import Settings
from reproduction.runs.configuration import describe, versions
from reproduction.runs.ranks import Ranks, count, is_first, join
from reproduction.runs.reporting import Outcome, summarise
from reproduction.runs.resume import Keeping, Refused, ResumePoint, find
from reproduction.runs.run_folder import RunFolder
from reproduction.runs.tensorboard_sink import TensorBoardSink
from reproduction.runs.training import Schedule, Trained, TrainingFailed, train

Model: TypeAlias = Callable[[Params, Tensor], Tensor]


class Benchmark(Protocol):
    """A family of tasks, the network that learns them and what it is judged by."""

    @property
    def figure(self) -> str:
        """What the runs are judged by, in words."""
        ...

    @property
    def head_loss(self) -> OutputLoss:
        """The loss, with its derivatives in the outputs."""
        ...

    @property
    def larger_is_better(self) -> bool:
        """Whether the figure is to rise."""
        ...

    def build_network(self) -> nn.Module:
        """Make the network, with fresh parameters from torch's own generator."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a task's loss, convex in the outputs."""
        ...

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        """Draw training tasks."""
        ...

    def validate(self, learner: Learner, params: Params) -> float:
        """Return the figure on the validation tasks, the same at each call."""
        ...

    def test(self, learner: Learner, params: Params) -> dict[str, Tensor]:
        """Return figures on the test tasks, one entry a task."""
        ...


def build_learner(settings: Settings, method: Method, benchmark: Benchmark) -> Learner:
    """Make the learner of one method, as the settings have it.

    Parameters
    ----------
    settings
        The settings.
    method
        Which of the methods.
    benchmark
        The tasks.

    Returns
    -------
    Learner
        The learner.
    """
    if settings.systems[method].adapted == "head":
        return _build_head_learner(settings, method, benchmark)
    return build_meta_learner(settings, method, benchmark)


def build_meta_learner(settings: Settings, method: Method, benchmark: Benchmark) -> MetaLearner:
    """Make the learner of a method that adapts the whole network.

    Parameters
    ----------
    settings
        The settings.
    method
        Which of the methods.
    benchmark
        The tasks.

    Returns
    -------
    MetaLearner
        The learner.
    """
    recipe, system = settings.recipes[method], settings.systems[method]
    network = benchmark.build_network().to(settings.device)
    own = dict(network.named_parameters())

    def model(params: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(network, {name: params[name] for name in own}, (x,))

    return MetaLearner(
        model=_in_precision(settings, model),
        loss=benchmark.loss,
        differentiation=system.differentiation,
        inner_solver=build_inner_solver(
            recipe, system, momentum=settings.momentum, head=(*own,)[-2:]
        ),
        lam=recipe.lam,
        linear_solver=build_linear_solver(
            system.linear_solver,
            recipe.cg_steps,
            settings.damping,
            recipe.lam,
            looks=settings.device.type == "cpu",
        ),
        curvature=system.curvature,
        truncate=settings.truncate,
        clip=settings.clip,
        method=method,
        learn_lam=recipe.learn_lam,
    )


def _build_head_learner(settings: Settings, method: Method, benchmark: Benchmark) -> HeadLearner:
    recipe, system = settings.recipes[method], settings.systems[method]
    body, head = split_head(benchmark.build_network().to(settings.device))

    def features(params: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(body, params, (x,))

    return HeadLearner(
        _in_precision(settings, features),
        head,
        benchmark.head_loss,
        recipe.inner_steps,
        recipe.lam,
        build_linear_solver(
            system.linear_solver,
            recipe.cg_steps,
            settings.damping,
            recipe.lam,
            looks=settings.device.type == "cpu",
            rtol=SOLVED_RESIDUAL / 2,
        ),
        settings.clip,
        method,
    )


def _in_precision(settings: Settings, model: Model) -> Model:
    def mixed(params: Params, x: Tensor) -> Tensor:
        # Under a transform a cast that is kept would outlive the level that it belongs to.
        with torch.autocast(settings.device.type, torch.bfloat16, cache_enabled=False):
            return model(params, x).float()

    return mixed if settings.precision == "bfloat16" else model


def run_experiment(
    settings: Settings, benchmark: Benchmark, console: Console
) -> tuple[dict[Method, Outcome], dict[Method, Learner]]:
    """Train and test the chosen method, then the others for the same time.

    The chosen method's files lie in the output folder, those of another in a folder of its
    name inside it; `config.json`, `parameters.pt` and `results.json` are written here.

    Parameters
    ----------
    settings
        The settings.
    benchmark
        The tasks.
    console
        Where progress is shown.

    Returns
    -------
    outcomes : dict
        The outcome of each method, the chosen one first; one of the others whose training failed
        is left out, and the console says so.
    learners : dict
        Their learners.

    Raises
    ------
    TrainingFailed
        If the training of the chosen method fails.
    """
    keep_freed_memory()
    with join(settings.device) as ranks:
        folder = RunFolder(settings.out)
        if not _goes_on(settings):
            _refuse_to_replace(settings)
        if settings.resume is None:
            _clear(settings)
        resumed = _find_checkpoint(settings, settings.method, benchmark, ranks, console)
        folder.write_json("config.json", _describe(settings, ended=False))
        outcomes: dict[Method, Outcome] = {}
        learners: dict[Method, Learner] = {}
        schedule = settings.meta_steps, settings.time_budget
        for method in (settings.method, *settings.compare):
            if method != settings.method:
                resumed = _find_checkpoint(settings, method, benchmark, ranks, console)
            learners[method] = build_learner(settings, method, benchmark)
            try:
                trained = _train_one(
                    settings, learners[method], benchmark, schedule, resumed, ranks, console
                )
            except TrainingFailed as failure:
                if method == settings.method:
                    raise
                console.print(f"left out: {failure}", markup=False, soft_wrap=True)
                continue
            tested = not settings.validation_only
            figures = benchmark.test(learners[method], trained.params) if tested else {}
            outcomes[method] = Outcome(trained, figures)
            folder.write_json("results.json", summarise(outcomes))
            if not settings.smoke:
                schedule = 10**9, outcomes[settings.method].trained.seconds
        folder.write_json("config.json", _describe(settings, ended=True))
    return outcomes, learners


def _folder_of(settings: Settings, method: Method) -> Path:
    return settings.out if method == settings.method else settings.out / method


def _all_series(settings: Settings) -> list[CheckpointSeries]:
    methods = (settings.method, *settings.compare)
    return [CheckpointSeries(_folder_of(settings, method)) for method in methods]


def _goes_on(settings: Settings) -> bool:
    """Whether a training goes on from a checkpoint of the output folder itself."""
    if settings.resume is None:
        return False
    if settings.resume == "auto":
        return True
    own = {one.path.resolve() for one in _all_series(settings)}
    return settings.resume.resolve().parent in own


def _refuse_to_replace(settings: Settings) -> None:
    """Refuse to write over a run that did not end, unless that is what is asked for."""
    if not is_first() or settings.force or _has_ended(settings.out):
        return
    if any(one.find() for one in _all_series(settings)):
        raise Refused(
            f"{settings.out} holds the checkpoints of a run that did not end: "
            "--resume auto goes on with it, --force begins anew in its place"
        )


def _has_ended(out: Path) -> bool:
    """Whether all methods of the run in a folder were trained and tested."""
    try:
        said = json.loads((out / "config.json").read_text()).get("ended")
    except (OSError, ValueError, AttributeError):
        said = None
    # Before that was said, a run had one result at its end.
    return bool(said) if said is not None else (out / "results.json").exists()


def _clear(settings: Settings) -> None:
    """Remove what the run before has left."""
    if is_first():
        for one in _all_series(settings):
            one.clear()
        (settings.out / "results.json").unlink(missing_ok=True)


def _find_checkpoint(
    settings: Settings, method: Method, benchmark: Benchmark, ranks: Ranks, console: Console
) -> Checkpoint | None:
    """Let the first process read, and tell the others."""
    point: ResumePoint = settings.resume
    if method != settings.method and point is not None:
        point = "auto"
    found = None
    if is_first():
        now = describe(settings, method, benchmark, ranks.size)
        series = CheckpointSeries(_folder_of(settings, method))
        found = find(point, series, now, console, force=settings.force)
    if ranks.size == 1:
        return found
    content = ranks.broadcast(found.encode() if found else b"")
    return Checkpoint.decode(content, "the first process's checkpoint") if content else None


def _train_one(
    settings: Settings,
    learner: Learner,
    benchmark: Benchmark,
    schedule: tuple[int, float | None],
    resumed: Checkpoint | None,
    ranks: Ranks,
    console: Console,
) -> Trained:
    recipe = settings.recipes[learner.method]
    folder = RunFolder(_folder_of(settings, learner.method))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    network = benchmark.build_network().to(settings.device)
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    sink = None
    if settings.tensorboard and is_first():
        step = resumed.figures["step"] if resumed else 0
        sink = TensorBoardSink(folder.path / "tensorboard", step)
    try:
        trained = train(
            learner,
            learner.start(_initial(settings.start_from, network)),
            lambda tasks: benchmark.sample(tasks, generator),
            lambda params: benchmark.validate(learner, params),
            Schedule(*schedule, recipe.tasks_per_step, recipe.lr, settings.validate_every),
            folder,
            console=console,
            figure=benchmark.figure,
            larger_is_better=benchmark.larger_is_better,
            keeping=Keeping(
                CheckpointSeries(folder.path),
                describe(settings, learner.method, benchmark, ranks.size),
                generator,
                settings.checkpoint_every,
                resumed,
            ),
            ranks=ranks,
            sink=sink,
            compute=_compute(settings, learner),
        )
    finally:
        if sink:
            sink.close()
    folder.write_bytes("parameters.pt", _saved(trained.params))
    return trained


def _initial(path: Path | None, network: nn.Module) -> Params:
    """Return the parameters to start from: the network's, or those that a training has kept."""
    params: Params = dict(network.named_parameters())
    if path is None:
        return params
    try:
        saved: Params = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: saved[name].shape for name in params}
    except (
        OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, UnpicklingError
    ) as error:  # fmt: skip
        raise Refused(f"--start-from {path}: not parameters of this network ({error})") from error
    if other := [name for name, leaf in params.items() if shapes[name] != leaf.shape]:
        raise Refused(f"--start-from {path}: of another network, in {', '.join(other)}")
    initial = {name: saved[name].to(leaf).detach() for name, leaf in params.items()}
    if STRENGTH in saved:  # there the features are divided by the square root of their number
        weight = split_head(network)[1][0]
        initial[weight] = initial[weight] / math.sqrt(initial[weight].shape[1])
    return initial


def _compute(settings: Settings, learner: Learner) -> MetaGradient:
    if settings.cuda_graphs:
        return RecordedMetaGradient(learner.meta_gradient, learner.method)
    if learner.differentiation == "implicit" and settings.recipes[learner.method].compile:
        return CompiledMetaGradient(learner.meta_gradient)
    return learner.meta_gradient


def _saved(params: Params) -> bytes:
    buffer = io.BytesIO()
    torch.save(params, buffer)
    return buffer.getvalue()


def _describe(settings: Settings, *, ended: bool) -> dict[str, object]:
    return {
        **dataclasses.asdict(settings),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "processes": count(),
        "clock": clock_for(settings.device, settings.threads),
        "ended": ended,
    }
