"""A model for people, in Markdown."""

from models.checkpoint import Bundle
from models.families import family


def card(name: str, bundle: Bundle) -> str:
    """Return what a model is, what it was trained on and how well, in Markdown."""
    model, training = bundle.model, bundle.training
    config = model.config
    one, several = ("KPI", "KPIs") if config.features == 1 else ("entity", "entities")
    use = f"the {one} it was trained on" if config.scaling == "train" else f"{several} it has never seen"
    if bundle.metrics and config.scaling == "train" and len(training.sources) > 1:
        use = f"{several} in the range of those it was trained on"
    interval = "mixed or unknown" if bundle.interval_ms is None else f"{bundle.interval_ms / 1000:g} s"
    kind = family(model.family)
    if bundle.members:
        use = f"{len(bundle.members)} KPIs, each by weights of its own"
    lines = [
        f"# {name}",
        "",
        f"{kind.title}, {model.parameters:,} parameters, for {use}: {kind.method}. It reads {config.window} points.",
        "",
        f"- features: {config.features}" + (f": {', '.join(bundle.metrics)}" if bundle.metrics else ""),
        f"- interval of the training data: {interval}",
        f"- scaling: {config.scaling}",
        f"- calibration: {sum(map(len, bundle.calibrations))} scores of held-out windows",
    ]
    if training.best_epoch:
        kept = training.held_out_losses[training.best_epoch - 1]
        lines.append(
            f"- trained on {training.windows:,} windows, seed {training.seed}, {training.epochs} epochs, the weights "
            f"of epoch {training.best_epoch} kept: held-out loss {kept:.4g}"
            + (
                ""
                if training.persistence_loss is None
                else f" (of the last value as forecast: {training.persistence_loss:.4g})"
            )
        )
    lines += [f"- {text}" for text in (training.notes, training.created) if text]
    if training.command:
        lines += ["", "    " + training.command.replace("\n", " ")]
    if training.sources:
        lines += ["", "| trained on | rows | SHA-256 |", "| --- | --- | --- |"]
        lines += [f"| {source.name} | {source.rows} | {source.sha256} |" for source in training.sources]
    return "\n".join(lines) + "\n"
