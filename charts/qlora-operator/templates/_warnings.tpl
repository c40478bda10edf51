{{- /* Settings that are allowed but may surprise, one line each; NOTES.txt ends with them. */ -}}
{{- define "qlora-operator.warnings" -}}
{{- if lt (int .Values.replicas) 2 }}
WARNING: replicas is 1: if its node fails there is no standby, and no run starts or ends until the pod is back.
{{- end }}
{{- range $key, $image := dict "image" .Values.image "trainerImage" .Values.trainerImage }}
{{- if and (not $image.digest) (has $image.tag (list "latest" "main" "master" "edge" "nightly" "dev")) }}
WARNING: {{ $key }}.tag {{ $image.tag }} is mutable: attempts of one run may use different images. Set a version, or {{ $key }}.digest.
{{- end }}
{{- end }}
{{- if and (hasPrefix "s3://" (.Values.platform.hub.mirror | default "")) (not .Values.platform.s3.endpoint) }}
WARNING: platform.hub.mirror is for air-gapped clusters, but platform.s3.endpoint is empty: the mirror is read from AWS.
{{- end }}
{{- if not (or .Values.platform.hub.mirror .Values.platform.hub.endpoint) }}
NOTE: models are downloaded from the public Hugging Face hub. In an air-gapped cluster, set platform.hub.mirror.
{{- end }}
{{- if and .Values.crds.enabled (not .Values.crds.keep) }}
WARNING: crds.keep is false: helm uninstall deletes the CRDs, and with them every QLoRAJob in the cluster.
{{- end }}
{{- if not .Values.rbac.create }}
WARNING: rbac.create is false: until you bind the rules in docs/operations.md to {{ include "qlora-operator.account" . }}, the operator waits.
{{- end }}
{{- range $key, $kind := dict "serviceMonitor" "ServiceMonitor" "podMonitor" "PodMonitor" "prometheusRule" "PrometheusRule" }}
{{- $settings := index $.Values.monitoring $key }}
{{- if and $settings.enabled (not (include "qlora-operator.monitored" (dict "root" $ "settings" $settings "kind" $kind))) }}
WARNING: monitoring.{{ $key }} was left out: the cluster has no {{ $kind }} CRD. Install the Prometheus operator, then upgrade the release.
{{- end }}
{{- end }}
{{- end -}}
