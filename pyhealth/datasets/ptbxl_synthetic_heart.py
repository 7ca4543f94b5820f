"""The heart behind :mod:`pyhealth.datasets.ptbxl_synthetic`: from traits to leads.

The heart is a dipole whose waves are Gaussians in time around each beat, as in
McSharry et al. 2003 (IEEE TBME 50:289). There each lead has its own Gaussians; here
each wave has a direction in space instead, and nine electrodes look at it, so that the
twelve leads agree with each other as real ones do. Waves, electrodes and the effects of
diagnoses are in :mod:`pyhealth.datasets.ptbxl_synthetic_tables`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .ptbxl_synthetic_tables import (
    EFFECTS,
    ELECTRODES,
    LEFT_VENTRICLE,
    MODEL_RATE,
    SECONDS,
    STAGES,
    WAVES,
    Effect,
)

__all__ = ["Body", "Session", "draw_body", "frontal_axis", "synthesise"]

_P_RIGHT, _P_LEFT, _Q, _SEPTAL, _MAIN, _POSTERIOR, _TERMINAL, _LATE, _ST, _T = range(10)
_QRS = slice(_Q, _LATE + 1)
_TIME = np.arange(SECONDS * MODEL_RATE) / MODEL_RATE
#: From the onset of the QRS to the R peak, and from the T peak to its end (seconds).
_QRS_ONSET, _T_END = 0.036, 0.080
#: Frontal axis of the QRS of WAVES (degrees).
_AXIS = 38.0
_MAINS_HERTZ = 50.0


@dataclass(frozen=True)
class Body:
    """Traits a person keeps from record to record.

    Attributes:
        turn: rotation of the QRS in the frontal plane, degrees; negative to the left.
        t_turn: the same of the T wave.
        spin: rotation around the long axis, degrees; positive turns the front of the
            heart to the left, so that the R wave grows later from V1 to V6.
        gain: factor on all voltages.
        t_gain: further factor on the T wave.
        width: factor on the QRS duration.
        septal: factor on the septal vector.
        st: early repolarisation, mV towards the left ventricle.
        pr: change of the PR interval, s.
        qt: QT interval at 60 beats a minute, s.
        rate: usual heart rate, beats a minute.
        sway: heart rate variability, share of the rate.

    Examples:
        >>> Body(turn=-30.0).qt
        0.4
    """

    turn: float = 0.0
    t_turn: float = 0.0
    spin: float = 0.0
    gain: float = 1.0
    t_gain: float = 1.0
    width: float = 1.0
    septal: float = 1.0
    st: float = 0.0
    pr: float = 0.0
    qt: float = 0.4
    rate: float = 70.0
    sway: float = 0.03


@dataclass(frozen=True)
class Session:
    """All that shapes one record, except the random numbers of the moment.

    Attributes:
        body: the person.
        severity: code -> severity of what the heart has, 1 is the size in EFFECTS.
        stage: age of an infarction, a key of STAGES.
        rate: heart rate, beats a minute.
        fibrillates: atrial fibrillation: no P waves, irregular beats.
        ectopic: one premature ventricular beat.
        drift: index of a chest electrode with a strong drift, or None.
        burst: the same with a burst of noise.
        loose: the same without contact.
        tremor: level of muscle and mains noise; 1 is ordinary.

    Examples:
        >>> Session(Body(), {"LVH": 1.0}, rate=54.0).rhythm
        'SBRAD'
    """

    body: Body
    severity: dict[str, float]
    stage: str = "Stadium III"
    rate: float = 70.0
    fibrillates: bool = False
    ectopic: bool = False
    drift: int | None = None
    burst: int | None = None
    loose: int | None = None
    tremor: float = 1.0

    @property
    def rhythm(self) -> str:
        """Code of the rhythm statement."""
        if self.fibrillates:
            return "AFIB"
        if self.rate < 56:
            return "SBRAD"
        if self.rate > 100:
            return "STACH"
        return "SARRH" if self.body.sway > 0.06 else "SR"


@dataclass
class _Beat:
    """One beat's waves; vectors (10, 3) in mV, times (10,) in s, see WAVES."""

    vectors: np.ndarray
    centres: np.ndarray
    before: np.ndarray
    after: np.ndarray
    qt: float


def draw_body(age: float, male: bool, rng: np.random.Generator) -> Body:
    """Draw the traits of a healthy person.

    Age turns the axis to the left and lowers voltage, T waves and heart rate
    variability; men have higher voltages, T waves and, when young, often an early
    repolarisation. These are the confounders a classifier has to see through.

    Args:
        age: years.
        male: sex.
        rng: source of the randomness.

    Returns:
        The traits.

    Examples:
        >>> 0.35 < draw_body(60.0, True, np.random.default_rng(0)).qt < 0.45
        True
    """
    normal = rng.standard_normal(11).tolist()
    aged = age - 50
    early = male and aged < 0 and rng.random() < 0.3
    return Body(
        turn=22 * normal[0] - 0.5 * aged,
        t_turn=14 * normal[1],
        spin=15 * normal[2],
        gain=math.exp(0.2 * normal[3] - 0.003 * aged) * (1.05 if male else 0.92),
        t_gain=math.exp(0.28 * normal[4] - 0.003 * aged) * (1.1 if male else 0.85),
        width=1 + 0.07 * normal[5],
        septal=math.exp(0.4 * normal[6]),
        st=0.07 * early,
        pr=0.018 * normal[7],
        qt=0.405 + 0.018 * normal[8],
        rate=71 + 12 * normal[9],
        sway=0.03 * math.exp(0.5 * normal[10] - 0.015 * aged),
    )


def frontal_axis(session: Session) -> float:
    """Return the electrical axis of the QRS in the frontal plane.

    Args:
        session: the record.

    Returns:
        Degrees in [-90, 270); 0 points left, 90 to the feet.

    Examples:
        >>> round(frontal_axis(Session(Body(turn=-60.0), {})))
        -22
    """
    turns = sum(EFFECTS[code].turn * s for code, s in session.severity.items())
    return (_AXIS + session.body.turn + turns + 90.0) % 360.0 - 90.0


def synthesise(session: Session, rng: np.random.Generator) -> np.ndarray:
    """Make the twelve leads of one record.

    Args:
        session: what the record shows.
        rng: source of the beat-to-beat variation and the noise.

    Returns:
        (12, 5000), millivolt, at MODEL_RATE, leads as in LEADS. III, aVR, aVL and aVF
        follow from I and II; V1 to V6 are taken against the mean of the limbs (Wilson).

    Examples:
        >>> synthesise(Session(Body(), {}), np.random.default_rng(0)).shape
        (12, 5000)
    """
    breath = 2 * math.pi * (rng.uniform(0.18, 0.32) * _TIME + rng.random())
    dipole = _dipole(session, _beat(session), breath, rng)
    electrodes = np.array(list(ELECTRODES.values()))
    # No two technicians glue the chest electrodes to the same spots.
    electrodes[3:] += 0.07 * rng.standard_normal((6, 3))
    potentials = electrodes @ dipole + _noise(session, breath, rng)
    if session.loose is not None:
        potentials[session.loose] = 0.0
    right, left, leg = potentials[:3]
    one, two = left - right, leg - right
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.vstack([limbs, potentials[3:] - potentials[:3].mean(axis=0)])


def _beat(session: Session) -> _Beat:
    """Lay the person's traits and the effects of the diagnoses onto the waves."""
    body = session.body
    table = list(WAVES.values())
    vectors = np.array([wave[3] for wave in table]) * body.gain
    centres, before, after = np.array([wave[:3] for wave in table]).T
    vectors[_SEPTAL] *= body.septal
    vectors[_T] *= body.t_gain
    vectors[_ST] += body.st * np.array(LEFT_VENTRICLE)
    vectors[_QRS] = _turned(vectors[_QRS], body.turn)
    vectors[_T] = _turned(vectors[_T], 0.4 * body.turn + body.t_turn)
    width, pr, qt = body.width, body.pr, body.qt
    for code, severity in session.severity.items():
        effect = EFFECTS[code]
        _apply_effect(vectors, effect, severity, session.stage)
        width *= 1 + severity * effect.width
        pr += severity * effect.pr
        qt += severity * effect.qt
    for times in (centres, before, after):
        times[_QRS] *= width
    centres[:_Q] -= pr + (width - 1) * _QRS_ONSET
    return _Beat(_spun(vectors, body.spin), centres, before, after, qt)


def _apply_effect(v: np.ndarray, effect: Effect, severity: float, stage: str) -> None:
    """Change the vectors (10, 3) in place."""
    toward = np.array(effect.toward)
    st_share, t_share = STAGES[stage] if effect.q else (1.0, 1.0)
    v[_P_RIGHT] *= 1 + severity * effect.p_right
    v[_P_LEFT] *= 1 + severity * effect.p_left
    v[_QRS] = _turned(v[_QRS], severity * effect.turn)
    v[_QRS] *= 1 + severity * effect.gain
    for wave in (_SEPTAL, _MAIN, _POSTERIOR):
        v[wave] -= min(severity * effect.r_loss, 1) * max(v[wave] @ toward, 0) * toward
    v[_SEPTAL] *= 1 - severity * effect.septal
    v[_Q] -= severity * effect.q * toward
    v[_MAIN] += severity * np.array(effect.main)
    v[_LATE] += severity * np.array(effect.late)
    mean = v[_QRS].sum(axis=0)
    against = -effect.discordant * mean / np.linalg.norm(mean)
    v[_T] *= 1 - severity * effect.t_loss
    v[_T] += severity * (effect.t * t_share * toward + against)
    v[_ST] += severity * (effect.st * st_share * toward + 0.4 * against)


def _turned(vectors: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate (..., 3) in the frontal plane; positive from left to feet."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return vectors @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])


def _spun(vectors: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate (..., 3) around the long axis; positive from left to back."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return vectors @ np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _r_peaks(
    session: Session, breath: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Times of the R peaks (s), from before the record to after it.

    The RR series has a slow wave at 0.1 Hz and one that follows the breath, the two
    peaks of the spectrum in McSharry et al. 2003.
    """
    mean, sway = 60 / session.rate, session.body.sway
    slow = 2 * math.pi * rng.random()
    peaks = [-mean * (1 + rng.random())]
    while peaks[-1] < SECONDS + mean:
        now = float(np.clip(peaks[-1], 0, SECONDS - 1 / MODEL_RATE))
        change = 0.6 * math.sin(0.2 * math.pi * now + slow)
        change += math.sin(breath[int(now * MODEL_RATE)])
        rr = mean * (1 + sway * change + 0.008 * rng.standard_normal())
        if session.fibrillates:
            rr = max(mean * math.exp(0.2 * rng.standard_normal()), 0.38)
        peaks.append(peaks[-1] + rr)
    return np.array(peaks)


def _dipole(
    session: Session, beat: _Beat, breath: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The heart vector over time (3, 5000), mV."""
    peaks = _r_peaks(session, breath, rng)
    extra = np.zeros((3, len(_TIME)))
    if session.ectopic:
        early = len(peaks) // 2
        extra = _ectopic_beat(0.6 * peaks[early] + 0.4 * peaks[early - 1])
        # Its own impulse finds the ventricles refractory.
        peaks = np.delete(peaks, early)
    k = np.searchsorted(peaks, _TIME, side="right") - 1
    since, until = _TIME - peaks[k], _TIME - peaks[k + 1]
    nearest = np.where(since < -until, since, until)
    # QT follows the preceding interval, by the cube root (Fridericia 1920).
    rr = np.diff(peaks, prepend=2 * peaks[0] - peaks[1])
    qt = beat.qt * np.cbrt(np.clip(rr, 0.4, 1.3))
    # A QRS that ends later pushes the T wave on.
    qt += beat.centres[_LATE] - WAVES["late"][0]
    t_peak = (qt - _QRS_ONSET - _T_END)[k]
    # P belongs to the coming beat, ST and T to the last one, QRS to the nearer one:
    # an eighth of the work of summing every beat's waves over the whole record.
    u = np.empty((10, len(_TIME)))
    u[:_Q] = until
    u[_QRS] = nearest
    u[:_ST] -= beat.centres[:_ST, None]
    u[_ST] = since - 0.45 * t_peak
    u[_T] = since - t_peak
    u /= np.where(u < 0, beat.before[:, None], beat.after[:, None])
    waves = np.exp(-0.5 * u * u)
    if session.fibrillates:
        # Strongest in V1, since the right atrium lies beneath that electrode.
        waves[:_Q] = np.outer((1.0, -0.5), _fibrillation(rng))
    dipole = beat.vectors.T @ waves + extra
    # The heart swings with the breath: a little in size, a little in direction.
    swing = 0.05 * np.sin(breath)
    x, y, z = dipole * (1 + swing)
    return np.stack([x - swing * y, y + swing * x, z])


def _ectopic_beat(when: float) -> np.ndarray:
    """A wide beat from the right ventricle with its opposite T wave (3, 5000), mV."""
    up = np.exp(-0.5 * ((_TIME - when) / 0.030) ** 2)
    down = np.exp(-0.5 * ((_TIME - when - 0.26) / 0.060) ** 2)
    return np.outer((1.1, 0.9, 0.9), up) - np.outer((0.35, 0.3, 0.3), down)


def _fibrillation(rng: np.random.Generator) -> np.ndarray:
    """Waves (5000,) in place of P, 5 to 8 Hz, of unsteady size."""
    pace = rng.uniform(5.0, 8.0) * _TIME
    pace += 0.3 * np.sin(3.1 * _TIME) + 0.2 * np.sin(8.3 * _TIME + rng.random())
    size = 0.5 + 0.2 * np.sin(2 * math.pi * (0.4 * _TIME + rng.random()))
    return size * np.sin(2 * math.pi * pace)


def _noise(
    session: Session, breath: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Noise of each electrode (9, 5000), mV: so it obeys the ties of the limb leads."""
    count = len(ELECTRODES)
    hertz = rng.uniform(0.05, 0.4, 3)
    phase = 2 * math.pi * hertz[:, None] * _TIME
    slow = np.vstack([np.sin(phase), np.cos(phase), np.sin(breath)])
    level = 0.03 * np.exp(0.5 * rng.standard_normal((count, 1)))
    muscle = 0.004 * session.tremor * np.exp(0.3 * rng.standard_normal((count, 1)))
    muscle = muscle * (1 + 0.4 * np.sin(2 * math.pi * (0.15 * _TIME + rng.random())))
    if session.drift is not None:
        level[session.drift] *= 4
    if session.burst is not None:
        around = (_TIME - rng.uniform(1, SECONDS - 1)) / 0.3
        muscle[session.burst] += 0.15 * np.exp(-0.5 * around * around)
    white = rng.standard_normal((count, len(_TIME)))
    # The difference over 8 ms passes most at 62 Hz, the middle of muscle noise.
    tremor = (white - np.roll(white, 4, axis=1)) / math.sqrt(2)
    mains = np.sin(2 * math.pi * (_MAINS_HERTZ * _TIME + rng.random()))
    hum = 0.003 * session.tremor * rng.standard_normal((count, 1))
    drift = level * rng.standard_normal((count, len(slow))) @ slow
    return drift + muscle * tremor + 0.003 * white + hum * mains
