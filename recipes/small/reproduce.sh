#!/usr/bin/env bash
# The default model from corpus to bundle: every stage resumes where it stopped, so run it again after an interruption.
#
# usage: recipes/small/reproduce.sh POP909.tar.gz [RUNS] [DATA]
# The minutes of each stage can be changed by the environment, e.g. LM_MINUTES=5 on a GPU. OPENEWLD=openewld.tar.gz and
# LIEDER=lieder.tar.gz (need music21) teach bars of two, three and six beats as well, GROOVES=groove.tar.gz how people drum.
set -euo pipefail

songs=$1
runs=${2:-runs/small}
data=${3:-data/popband}
recipes=$(python -c "from importlib.resources import files; print(files('duotok.recipes'))")
# Training: large tensors come and go in every step, so keep their memory instead of giving it back each time.
# Not for generating, whose small steps take twice as long when threads sleep between them.
training=(OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000)

make_corpus() { # split hours [options]
    local split=$1 hours=$2
    shift 2
    local drummers=${GROOVES:-}
    [ "$split" = train ] || drummers=
    python -m duotok.recipes.corpus.popband --songs "$songs" --out "$data" --split "$split" --hours "$hours" --seed 0 \
        --phrases "${PHRASES:-8}" --workers "$(nproc)" ${drummers:+--grooves "$drummers"} "$@"
}
train() { # module config run minutes [settings]
    local module=$1 config=$2 run=$3 minutes=$4
    shift 4
    [ -d "$runs/$run/final" ] || env "${training[@]}" python -m "duotok.recipes.$module" "$recipes/$config" --out "$runs/$run" \
        --minutes "$minutes" "$@"
}

hours=${CORPUS_HOURS:-22}
make_corpus train "$hours"
plus() { awk "BEGIN { print $hours + $1 }"; } # hours are those of the whole split
# Most songs are in four, so that others are asked for by themselves.
[ -z "${OPENEWLD:-}" ] || make_corpus train "$(plus 3)" --songs "$OPENEWLD" --name ewld
[ -z "${OPENEWLD:-}" ] || make_corpus train "$(plus 6)" --songs "$OPENEWLD" --name ewld3 --beats-per-bar 2 3 6
[ -z "${LIEDER:-}" ] || make_corpus train "$(plus 7)" --songs "$LIEDER" --name lieder3 --beats-per-bar 2 3 6
make_corpus validation "${VALIDATION_HOURS:-0.12}"
make_corpus test "${TEST_HOURS:-0.6}"

from=(--set "data.manifest=$data/train.jsonl")
train tokenizer.stage1 tokenizer/stage1/small.yaml stage1 "${STAGE1_MINUTES:-4}" "${from[@]}"
[ -f "$runs/text.model" ] || python -m duotok.recipes.tokenizer.train_text_model --manifest "$data/train.jsonl" --out "$runs/text.model"
train tokenizer.stage2 tokenizer/stage2/small.yaml stage2-lyrics "${LYRICS_MINUTES:-60}" "${from[@]}" \
    --set "start_from=$runs/stage1/final" --set "text=$runs/text.model"
# Lyrics were learned at the cost of pitch: the balance is turned back.
train tokenizer.stage2 tokenizer/stage2/small.yaml stage2 "${STAGE2_MINUTES:-45}" "${from[@]}" \
    --set "start_from=$runs/stage2-lyrics/final" --set "text=$runs/text.model" --set train.learning_rate=8e-4 \
    --set weights.mel=0.5 --set weights.chroma=12.0 --set weights.text=0.5 --set weights.masks=0.3 \
    --set mixture.mix=1 --set mixture.accompaniment=4 --set data.speed_semitones=2
train tokenizer.train_separator tokenizer/train_separator/small.yaml separator "${SEPARATOR_MINUTES:-60}" "${from[@]}" \
    --set "start_from=$runs/stage2-lyrics/final"
train tokenizer.stage3 tokenizer/stage3/small.yaml stage3-all "${STAGE3_MINUTES:-40}" "${from[@]}" \
    --set "start_from=$runs/stage2/final"

python -m duotok.recipes.lm.tokenize --tokenizer "$runs/stage3-all/final" --manifest "$data/train.jsonl" \
    --out "$runs/tokens-all/train" --workers "$(nproc)"
[ -d "$runs/stage3/final" ] || python -m duotok.recipes.tokenizer.prune --tokenizer "$runs/stage3-all/final" \
    --tokens "$runs/tokens-all/train" --out "$runs/stage3/final"

train renderer.train_spectral_vae renderer/train_spectral_vae/small.yaml vae "${VAE_MINUTES:-20}" "${from[@]}"

python -m duotok.recipes.lm.tokenize --tokenizer "$runs/stage3/final" --manifest "$data/train.jsonl" \
    --out "$runs/tokens/train" --workers "$(nproc)"
train tokenizer.train_harmony_reader tokenizer/train_harmony_reader/small.yaml harmony "${HARMONY_MINUTES:-4}" "${from[@]}" \
    --set "data.tokenizer=$runs/stage3/final" --set "data.tokens=$runs/tokens/train"
# The sheet reader needs more songs than there are: it hears them in other keys, tempi and voices too, and scores
# that are sung by codes alone, among them OpenEWLD's and Lieder, whose bars have not all four beats.
transposed=$data/train-transposed.jsonl
read -ra semitones <<<"${SHEET_SEMITONES:-0 4}"
python -m duotok.recipes.corpus.transpose --manifest "$data/train.jsonl" --semitones "${semitones[@]}" --out "$transposed"
python -m duotok.recipes.lm.tokenize --tokenizer "$runs/stage3/final" --manifest "$transposed" \
    --out "$runs/tokens-transposed/train" --workers "$(nproc)"
train lm.train_sheet_reader lm/train_sheet_reader/small.yaml sheet "${SHEET_MINUTES:-60}" --set "data.manifest=$transposed" \
    --set "data.tokens=$runs/tokens-transposed/train" --set "tokenizer=$runs/stage3/final" \
    --set "data.scores=[[$songs, 0.15]${OPENEWLD:+, [$OPENEWLD, 0.2]}${LIEDER:+, [$LIEDER, 0.2]}]" --set "data.score_cache=$data/scores"
train lm.train lm/small.yaml lm "${LM_MINUTES:-90}" --set "data.tokens=$runs/tokens/train" \
    --set "tokenizer=$runs/stage3/final" --set "sheets.reader=$runs/sheet/final" \
    --set "sheets.manifest=$data/train.jsonl" ${OPENEWLD:+--set sheets.other_meters=0.35}

train tokenizer.train_score_reader tokenizer/train_score_reader/small.yaml score "${SCORE_MINUTES:-60}" \
    --set "data.tokens=$runs/tokens/train" --set "data.manifest=$data/train.jsonl" \
    --set "data.tokenizer=$runs/stage3/final"

python -m duotok.recipes.renderer.latents --tokenizer "$runs/stage3/final" --vae "$runs/vae/final" \
    --manifest "$data/train.jsonl" --track accompaniment --out "$runs/latents/train"
train renderer.train_diffusion renderer/train_diffusion/small.yaml accompaniment "${DIFFUSION_MINUTES:-40}" \
    --set "data.latents=$runs/latents/train" --set "data.manifest=$data/train.jsonl" \
    --set "vae=$runs/vae/final" --set "tokenizer=$runs/stage3/final"

# The VAE's decoder has learned means; now it learns to play what a recording could be, from drawn latents too.
[ -d "$runs/latents/drawn" ] || head -n "${DRAWN_ITEMS:-160}" "$data/train.jsonl" > "$data/drawn.jsonl"
python -m duotok.recipes.renderer.latents --tokenizer "$runs/stage3/final" --vae "$runs/vae/final" \
    --manifest "$data/drawn.jsonl" --drawn-by "$runs/accompaniment/final" --out "$runs/latents/drawn"
train renderer.train_spectral_vae renderer/train_spectral_vae/sharper/small.yaml vae-sharp "${SHARP_MINUTES:-40}" \
    "${from[@]}" --set "start_from=$runs/vae/final" --set "data.drawn=$runs/latents/drawn"

vocal= # its decoder is for `python -m duotok.recipes.accompany.render --track vocal`; generate does without
if [ "${VOCAL_MINUTES:-34}" != 0 ]; then
    python -m duotok.recipes.renderer.latents --tokenizer "$runs/stage3/final" --vae "$runs/vae/final" \
        --manifest "$data/train.jsonl" --track vocal --out "$runs/latents/vocal"
    train renderer.train_diffusion renderer/train_diffusion/vocal/small.yaml vocal "${VOCAL_MINUTES:-34}" \
        --set "data.latents=$runs/latents/vocal" --set "tokenizer=$runs/stage3/final"
    vocal=$runs/vocal/final
fi

python -m duotok.recipes.accompany.bundle --tokenizer "$runs/stage3/final" --lm "$runs/lm/final" --vae "$runs/vae-sharp/final" \
    --accompaniment "$runs/accompaniment/final" ${vocal:+--vocal-decoder "$vocal"} \
    --separator "$runs/separator/final" --out "$runs/bundle" --half \
    --data pop909 --data musescore-general --data kokoro --data espeak --licence apache-2.0 \
    --default guidance=1 --default temperature=1 --default top_k=0 --default top_p=1 --default candidates=4 \
    --default steps=4 --default render_guidance=1 --default playing_guidance=3 --score-reader "$runs/score/final"
python -m duotok.recipes.evaluation.score all --corpus "$data" --bundle "$runs/bundle" --out "$runs/results.json"
