"""Metric catalogue: title, meaning and report section of every metric."""

from typing import NamedTuple

from gadjax.evaluation.layout_control import SNAPSHOT_STEPS
from gadjax.evaluation.noise_control import PATHS, POINTS
from gadjax.evaluation.oracles import World


class Metric(NamedTuple):
    """Title, meaning and section (a key of GROUPS) of a metric."""

    title: str
    meaning: str
    group: str


# Heading of the section, and the unit that was resampled for the intervals.
GROUPS = {
    "prompts": (
        "Prompt adherence and fidelity",
        "of adherence over pictures (Wilson), those of a prompt taken as a cluster",
    ),
    "diversity": ("Diversity among the seeds of a prompt", "over prompts"),
    "seeds": ("Seed consistency", "over prompts"),
    "sensitivity": ("Noise sensitivity", "over prompts"),
    "retrieval": ("Noise retrieval", "over the library's noises, which all captions share"),
    "control": ("Layout control", "over moves, each from a noise of its own"),
    "path": ("Interpolation between noises", "over paths, each between two noises of its own"),
    "learned": (
        "Named extractors and scorers",
        "over prompts; distances between sets have none, as resampled pictures repeat themselves",
    ),
    "external": ("Outside scripts", "as their files give them, else over prompts"),
}
NEAR, NEAR_SHARE = 16, 0.1  # prompts also drawn from perturbed noise; share of new noise
# Metrics of the summary table.
SUMMARY = (
    "adherence",
    "frechet",
    "vendi_ratio",
    "alignment_pixels",
    "tangent_cosine",
    "retrieval",
    "control",
    "path_agreement",
)
FRECHET_LIMIT = (
    "of infinitely many seeds, by the values of all seeds and of half of them: the bias falls as "
    "1 / pictures; the teacher's own is 0 up to chance, and may be negative"
)
VENDI_CORRECTED = (
    "the bias at this number of seeds removed to first order, by leaving out one seed at a time "
    "(jackknife); the uncorrected score is a lower bound of that of many seeds"
)

_BEFORE = {
    "adherence": Metric(
        "prompt adherence",
        "share of the pictures that show what their prompt names, by the world's oracle",
        "prompts",
    ),
    "frechet": Metric(
        "Fréchet distance",
        "between the features of these pictures and of the teacher's at other seeds of the same "
        "prompts; the teacher's own value is the floor for this many pictures, by about which the "
        "others are too large as well",
        "prompts",
    ),
    "frechet_limit": Metric("Fréchet distance, extrapolated", FRECHET_LIMIT, "prompts"),
    "vendi": Metric(
        "Vendi score",
        "effective number of different pictures among the seeds of a prompt (cosine of features), "
        "mean over prompts: 1 = all alike, number of seeds = all different; more seeds give more, "
        "so it is compared at equal numbers only",
        "diversity",
    ),
    "vendi_corrected": Metric("Vendi score, corrected", VENDI_CORRECTED, "diversity"),
    "vendi_ratio": Metric("Vendi score / teacher's", "1 = as diverse as the teacher", "diversity"),
    "distance_features": Metric(
        "distance between seeds, features",
        "root mean square difference of two pictures of one prompt, mean over pairs and prompts",
        "diversity",
    ),
    "distance_features_ratio": Metric(
        "distance, features / teacher's", "1 = as diverse as the teacher", "diversity"
    ),
    "distance_pixels": Metric(
        "distance between seeds, pixels", "the same for colour values in [-1, 1]", "diversity"
    ),
    "distance_pixels_ratio": Metric(
        "distance, pixels / teacher's", "1 = as diverse as the teacher", "diversity"
    ),
    "coverage": Metric(
        "coverage of open attributes",
        "number of different words that a prompt's seeds show for an attribute which it leaves "
        "open, in pictures of the world, mean over attributes and prompts",
        "diversity",
    ),
    "coverage_ratio": Metric("coverage / teacher's", "1 = as much as the teacher", "diversity"),
    "alignment_features": Metric(
        "seed alignment, features",
        "share of the pictures whose nearest among the teacher's pictures of that prompt is the "
        "one from the same noise; chance is 1 / seeds",
        "seeds",
    ),
    "alignment_pixels": Metric("seed alignment, pixels", "the same by colour values", "seeds"),
    "identity_features": Metric(
        "seed identity, features",
        "share of the pictures whose nearest among the model's own from perturbed noises "
        f"(sqrt(1 - r^2) z + r n, r = {NEAR_SHARE}) of all seeds of that prompt is the one of the "
        f"same seed; of the first {NEAR} prompts; chance is 1 / seeds",
        "seeds",
    ),
    "identity_pixels": Metric("seed identity, pixels", "the same by colour values", "seeds"),
    "tangent_cosine": Metric(
        "noise sensitivity, cosine",
        "between J v of this map from noise to x0 and of the teacher's, v a random direction, "
        "mean: 1 = a change of the noise has the same effect",
        "sensitivity",
    ),
    "tangent_norm_ratio": Metric(
        "noise sensitivity, norm / teacher's",
        "|J v| over the teacher's, geometric mean; below 1: outputs respond less to the noise",
        "sensitivity",
    ),
    "retrieval": Metric(
        "noise retrieval",
        "captions that leave attributes open; for every word of those, the noises of the library "
        "from which the teacher draws it: share of them from which this model draws it too",
        "retrieval",
    ),
    "retrieval_chance": Metric(
        "retrieval by chance",
        "how often this model draws such a word from the library's other noises: the value for "
        "noises without meaning",
        "retrieval",
    ),
}
_AFTER = {
    "control": Metric(
        "layout control",
        f"share of shapes that {SNAPSHOT_STEPS[-1]} steps on the noise, along the gradient through "
        "this model's own sampler, bring to a target place, in a picture that still shows what the "
        "caption names",
        "control",
    ),
    **{
        f"control_{n}": Metric(f"after {n} steps", "the same after fewer steps", "control")
        for n in SNAPSHOT_STEPS[:-1]
    },
    "control_angle": Metric(
        "change of the noise, degrees",
        "angle between the noises before and after; of independent noises 90",
        "control",
    ),
    "path_agreement": Metric(
        "attribute agreement along the path",
        f"{PATHS} paths at most of {POINTS} noises, on the great arc between two: how often an "
        "attribute that the caption leaves open has the word that it has in the teacher's picture "
        "from the same noise",
        "path",
    ),
    "path_length_features": Metric(
        "length of the path, features",
        "sum of the root mean square differences of neighbours, mean over paths",
        "path",
    ),
    "path_length_features_ratio": Metric(
        "length, features / teacher's", "below 1, outputs respond less to the noise", "path"
    ),
    "path_length_pixels": Metric(
        "length of the path, pixels", "the same for colour values in [-1, 1]", "path"
    ),
    "path_length_pixels_ratio": Metric(
        "length, pixels / teacher's", "below 1, outputs respond less to the noise", "path"
    ),
    "path_jump_features": Metric(
        "largest jump, features",
        f"the longest step as a share of its path's length, mean: even steps have "
        f"{1 / (POINTS - 1):.3f}, one leap 1",
        "path",
    ),
    "path_jump_pixels": Metric("largest jump, pixels", "the same by colour values", "path"),
}


def catalogue(world: World) -> dict[str, Metric]:
    """Metrics by name, in the report's order; retrieval also for each attribute of the world."""
    by_attribute = {}
    if world.oracle and world.captions:
        for name, is_open in zip(
            world.oracle.attributes, world.oracle.left_open(world.captions).any(0), strict=True
        ):
            if is_open:
                by_attribute[f"retrieval_{name}"] = Metric(
                    f"retrieval of {name}", "of one attribute alone", "retrieval"
                )
                by_attribute[f"retrieval_{name}_chance"] = Metric(
                    f"retrieval of {name} by chance", "of one attribute alone", "retrieval"
                )
    return {**_BEFORE, **by_attribute, **_AFTER}
