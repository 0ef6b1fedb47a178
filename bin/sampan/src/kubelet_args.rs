//! `--kubelet-arg KEY=VALUE`: the settings of upstream's kubelet that this one has, under upstream's names.
//!
//! Upstream counterpart: cmd/kubelet/app/options. Differences: images and pods share one file system, so
//! `imagefs.available` and `nodefs.available` are one threshold (the higher counts).
use anyhow::{Context, Result, bail};
use sampan_kinds::quantity;
use sampan_kubelet::KubeletConfig;

type Apply = fn(&mut KubeletConfig, &str) -> Result<()>;

/// Name, and what it does.
const SETTINGS: &[(&str, Apply)] = &[
    ("allowed-unsafe-sysctls", |config, text| {
        config.allowed_unsafe_sysctls.extend(text.split(',').map(str::to_string));
        Ok(())
    }),
    ("eviction-hard", eviction_hard),
    ("image-gc-high-threshold", |config, text| percent(text).map(|p| config.image_gc_high_percent = p)),
    ("image-gc-low-threshold", |config, text| percent(text).map(|p| config.image_gc_low_percent = p)),
    ("kube-reserved", reserved),
    ("max-parallel-image-pulls", |config, text| {
        config.parallel_pulls = usize::try_from(positive(text)?)?;
        Ok(())
    }),
    ("max-pods", |config, text| positive(text).map(|n| config.max_pods = n)),
    ("pod-max-pids", |config, text| {
        config.pod_pids_limit = text.parse::<i64>().context("expected a number")?.max(0);
        Ok(())
    }),
    ("system-reserved", reserved),
];

/// Puts the flags' values into `config`; later ones win.
pub fn apply(config: &mut KubeletConfig, given: &[String]) -> Result<()> {
    for arg in given {
        let plain = arg.trim_start_matches("--");
        let (key, value) =
            plain.split_once('=').with_context(|| format!("--kubelet-arg {arg}: expected KEY=VALUE"))?;
        let Some((_, set)) = SETTINGS.iter().find(|(name, _)| *name == key) else {
            let known: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
            bail!("--kubelet-arg {arg}: this kubelet has no {key}; it has {}", known.join(", "));
        };
        set(config, value).with_context(|| format!("--kubelet-arg {arg}"))?;
    }
    if config.image_gc_low_percent >= config.image_gc_high_percent {
        bail!(
            "--kubelet-arg image-gc-low-threshold={}: must be below image-gc-high-threshold={}",
            config.image_gc_low_percent,
            config.image_gc_high_percent
        );
    }
    Ok(())
}

fn percent(text: &str) -> Result<u64> {
    match text.parse() {
        Ok(percent) if percent <= 100 => Ok(percent),
        _ => bail!("expected a percentage from 0 to 100"),
    }
}

fn positive(text: &str) -> Result<i64> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => bail!("expected a number above 0"),
    }
}

/// `memory.available<100Mi,nodefs.available<10%`; what is not named is not watched, as upstream's.
fn eviction_hard(config: &mut KubeletConfig, text: &str) -> Result<()> {
    (config.eviction_memory_bytes, config.eviction_disk_percent) = (0, 0);
    for threshold in text.split(',').filter(|t| !t.is_empty()) {
        let (signal, value) =
            threshold.split_once('<').with_context(|| format!("{threshold:?}: expected SIGNAL<VALUE"))?;
        match signal {
            "memory.available" => {
                let (amount, _) = quantity::parse(value)
                    .with_context(|| format!("{threshold:?}: expected a quantity such as 100Mi"))?;
                config.eviction_memory_bytes = u64::try_from(amount.value()).unwrap_or(0);
            }
            "nodefs.available" | "imagefs.available" => {
                let value = value
                    .strip_suffix('%')
                    .with_context(|| format!("{threshold:?}: expected a percentage such as 10%"))?;
                config.eviction_disk_percent = config.eviction_disk_percent.max(percent(value)?);
            }
            _ => {
                bail!("{signal:?}: only memory.available, nodefs.available and imagefs.available are watched")
            }
        }
    }
    Ok(())
}

/// `cpu=200m,memory=128Mi`; of kube-reserved and system-reserved the sum is kept from pods.
fn reserved(config: &mut KubeletConfig, text: &str) -> Result<()> {
    for one in text.split(',').filter(|t| !t.is_empty()) {
        let (name, value) =
            one.split_once('=').with_context(|| format!("{one:?}: expected RESOURCE=QUANTITY"))?;
        if !matches!(name, "cpu" | "memory" | "ephemeral-storage" | "pid") {
            bail!("{name:?}: only cpu, memory, ephemeral-storage and pid can be reserved");
        }
        let (more, format) =
            quantity::parse(value).with_context(|| format!("{one:?}: {value:?} is not a quantity"))?;
        let before = config.reserved.get(name).and_then(|text| quantity::parse(text));
        let sum = before.map_or(more, |(before, _)| before.plus(more));
        config.reserved.insert(name.to_string(), quantity::canonical(sum, format));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(given: &[&str]) -> Result<KubeletConfig> {
        let mut config = KubeletConfig::new("n", "/data".into());
        let given: Vec<String> = given.iter().map(|g| (*g).to_string()).collect();
        apply(&mut config, &given).map(|()| config)
    }

    #[test]
    fn settings() {
        let found = config(&[
            "max-pods=50",
            "--eviction-hard=memory.available<64Mi,imagefs.available<5%,nodefs.available<3%",
            "image-gc-high-threshold=100",
            "system-reserved=cpu=100m,memory=64Mi",
            "kube-reserved=cpu=200m",
        ])
        .unwrap();
        assert_eq!((found.max_pods, found.eviction_disk_percent), (50, 5));
        assert_eq!((found.eviction_memory_bytes, found.image_gc_high_percent), (64 << 20, 100));
        assert_eq!((found.reserved["cpu"].as_str(), found.reserved["memory"].as_str()), ("300m", "64Mi"));
        let found = config(&["eviction-hard=nodefs.available<1%"]).unwrap();
        assert_eq!((found.eviction_memory_bytes, found.eviction_disk_percent), (0, 1));
        for (wrong, says) in [
            ("max-pods=0", "a number above 0"),
            ("max-pods", "expected KEY=VALUE"),
            ("feature-gates=All=true", "this kubelet has no feature-gates"),
            ("eviction-hard=nodefs.inodesFree<5%", "only memory.available"),
            ("eviction-hard=nodefs.available<1Gi", "expected a percentage"),
            ("system-reserved=gpu=1", "only cpu"),
            ("image-gc-high-threshold=101", "from 0 to 100"),
            ("image-gc-low-threshold=90", "must be below image-gc-high-threshold=85"),
        ] {
            let error = format!("{:#}", config(&[wrong]).unwrap_err());
            assert!(error.contains(says) && error.contains(wrong.split('=').next().unwrap()), "{error}");
        }
    }
}
